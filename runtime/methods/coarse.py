"""Coarse solvers of SRDS: a block in one model call, and how a change of its start moves its end.

Parareal needs two things of a coarse solver over the steps first .. last - 1:

    start        the first guess of the block's end, from its start and the model's output u there
    correction   C: what a change of the start, d = [registers; u]_new - [registers; u]_old, adds
                 to the block's end, C d

The output u at the start is evaluated in any case, as the first of the fine steps, so that neither
costs a model call.  "hold" keeps u over the block (`Plan.hold`; one DDIM step for DDIM).

A guided model is stiff: with G = sigma d eps / d x, the Jacobian of the noise prediction in units
in which a model that knows its x0 has G = 1, guidance makes G greater, see below.  A change of x
then dies out within a step or two, and one long explicit step, to which hold amounts, overshoots:
more iterations are needed (docs/results/srds.md).  "krylov" lets a change evolve through all the
fine steps of the block instead, in the space spanned by dx and G dx, both of which are known: of G
this takes

    G dx = a dx + q,        q orthogonal to dx         measured
    G q  = c |q|^2 / |dx|^2 dx + a q,   c = 0.3        taken to be so

and a for every direction orthogonal to both (further registers of multistep solvers).  By hand, no
command repeats it, in units of |dx| and |q| on the bundled model (DDIM, 25 steps, 4 to 8 prompts):
a was 1.7 to 4.3, in the place of the second a 2.4 to 3.6, |q| / |dx| about 2.5, and c times that
0.3 to 1.75.  For a symmetric Jacobian c would be 1, as in Lanczos' method.  No step waits for the
host: the coefficients are formed from inner products on the device.

After Gander and Petcu, "Analysis of a Krylov subspace enhanced parareal algorithm" (2008), which
spends its fine evaluations on the subspace; here it is spanned by what is there.

Three look back to the block before: "2m" is one step of DPM-Solver++ 2M a block, "extrapolate" its
counterpart for the output itself, and "2m-krylov" guesses as "2m" does and corrects as "krylov"
does.  What they ask for besides, a value at the start of the block before, is there as well.  It
comes to rest with the boundaries, so that the correction is exactly 0 where nothing has changed, as
it is for the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sidestep.runtime.methods.criteria.carried_error import SPREAD
from sidestep.runtime.plan import Plan
from sidestep.runtime.plan_course import data_maps, infer_prediction
from sidestep.runtime.predictions import find_prediction
from sidestep.runtime.upload import upload

RETURN = 0.3
"""c; 0.1 to 0.7 by those measurements."""


class Hold:
    """The model's output of the block's start holds for all of it.

    Attributes:
        looks_back: Whether `value` at the start of the block before is asked for. If so, the first
            guess acts on `ahead` in the place of the output u.
        throughout: Whether the correction does so too.
    """

    looks_back: ClassVar[bool] = False
    throughout: ClassVar[bool] = False

    def __init__(self, plan: Plan, bounds: Sequence[int], device: torch.device) -> None:
        """Composes the steps of every block.

        Args:
            plan: The sampler, of K steps.
            bounds: ``[B + 1]``, 0 to K: where the blocks begin and end.
            device: Of the coefficients.

        Raises:
            ValueError: The plan has a threshold.
        """
        R = plan.registers
        held = [plan.hold(a, b).matrices[0, :, : R + 1] for a, b in pairwise(bounds)]
        self._held = torch.tensor(np.stack(held), dtype=torch.float64, device=device)

    def start(
        self,
        blocks: Sequence[int],  # [n]
    ) -> Tensor:  # [n, R, R + 1] fp64
        """The first guess of a block's end, from ``[registers; u]`` at its start."""
        return self._held[upload(blocks, torch.int64, self._held.device)]

    def correction(
        self,
        blocks: Sequence[int],  # [n]
        gram: Tensor,  # [n, R + 1, R + 1]
    ) -> Tensor:  # [n, R, R + 1] fp64
        """C of each row.

        Args:
            blocks: The row's block, counted from 0.
            gram: Inner products of the differences ``[registers; u]_new - [registers; u]_old``.
        """
        return self.start(blocks)

    def held(
        self,
        blocks: Sequence[int],  # [n]
    ) -> Tensor:  # [n, R, R + 1] fp64
        """C as "hold" has it, of what `correction` acts on."""
        return self.start(blocks)

    def value(
        self,
        block: int,
        x: Tensor,  # [...]
        u: Tensor,  # [...]
    ) -> Tensor:  # [...]
        """What the start of a block, counted from 0, tells the block after it: the output."""
        return u

    def ahead(
        self,
        block: int,
        value: Tensor,  # [...]
        before: Tensor | None,  # [...]
    ) -> Tensor:  # [...]
        """What holds for a block, from the values at its start and at that of the block before."""
        return value


class Krylov(Hold):
    """A change goes through all the fine steps of the block, its Jacobian known on two vectors."""

    def __init__(self, plan: Plan, bounds: Sequence[int], device: torch.device) -> None:
        """Gathers the steps of every block; see `Hold` for the arguments and errors."""
        super().__init__(plan, bounds, device)
        R, longest = plan.registers, max(b - a for a, b in pairwise(bounds))
        slopes = output_slopes(plan)  # gain, shift of each step
        self.known = slopes is not None
        if slopes is None:
            return
        # Beyond a block's end a step that changes nothing.
        steps = np.tile(np.eye(R, R + 3), (len(bounds) - 1, longest, 1, 1))
        for block, (first, last) in enumerate(pairwise(bounds)):
            steps[block, : last - first, :, : R + 1] = plan.matrices[first:last, :, : R + 1]
            steps[block, : last - first, :, R + 1 :] = slopes[first:last, None]
        self._steps = torch.tensor(steps, dtype=torch.float64, device=device)

    def correction(
        self,
        blocks: Sequence[int],  # [n]
        gram: Tensor,  # [n, R + 1, R + 1]
    ) -> Tensor:  # [n, R, R + 1] fp64
        """C of each row; that of `Hold` where the plan's lambda or prediction is not known."""
        if not self.known:
            return super().correction(blocks, gram)
        steps = self._steps[upload(blocks, torch.int64, gram.device)]  # [n, m, R, R + 3]
        inner, R = gram.double(), gram.shape[1] - 1
        gain, shift = steps[:, 0, 0, R + 1, None], steps[:, 0, 0, R + 2, None]
        basis = torch.eye(R + 1, dtype=torch.float64, device=gram.device)
        dx, du = basis[0].expand(len(gram), -1), basis[R].expand(len(gram), -1)
        jdx = _over(du - shift * dx, gain)  # G dx
        a = _over(_dot(dx, inner, jdx), inner[:, 0, :1])
        q = jdx - a * dx
        back = RETURN * _over(_dot(q, inner, q), inner[:, 0, :1])
        state = basis[:R].expand(len(gram), -1, -1)  # [n, R, R + 1], in terms of the differences
        for step in steps.unbind(1):
            x, gain, shift = state[:, 0], step[:, 0, R + 1, None], step[:, 0, R + 2, None]
            along = _over(_dot(x, inner, dx), inner[:, 0, :1])
            across = _over(_dot(x, inner, q), _dot(q, inner, q))
            jx = across * back * dx + along * q + a * x  # G x
            u = gain * jx + shift * x
            state = (step[:, :, :R, None] * state[:, None]).sum(2) + step[:, :, R, None] * u[
                :, None
            ]
        return state


class Extrapolate(Hold):
    """The output is extrapolated along lambda to the block's middle, from two block starts.

        v = u_i + (u_i - u_{i-1}) / (2 r_i),    r_i = (l_i - l_{i-1}) / (l_{i+1} - l_i)

    with l_i = lambda at the start of block i, and v held for all of it.  Of first order (v = u_i)
    in the first block, which has no past, in the last one, whose end may have an infinite lambda,
    and where r_i is no number above 0.
    """

    looks_back = True
    throughout = True

    def __init__(self, plan: Plan, bounds: Sequence[int], device: torch.device) -> None:
        """Gathers lambda at the ends of the blocks; see `Hold` for the arguments.

        Raises:
            ValueError: The plan has a threshold, or does not know its lambda.
        """
        if plan.log_snr is None:
            raise ValueError(
                f"SRDS: {plan.name} does not know its lambda, along which the coarse solver "
                "extrapolates, expected a plan that does, or coarse='krylov'"
            )
        super().__init__(plan, bounds, device)
        self._weights = _look_ahead(plan.log_snr[list(bounds[:-1])])

    def ahead(
        self,
        block: int,
        value: Tensor,  # [...]
        before: Tensor | None,  # [...]
    ) -> Tensor:  # [...]
        """v of a block, counted from 0."""
        weight = self._weights[block]
        return value if before is None or weight == 0 else value + weight * (value - before)


class TwoStep(Extrapolate):
    """DPM-Solver++ 2M: the data prediction x0 is extrapolated so, in the place of the output.

        v = (1 + 1 / (2 r_i)) x0_i - 1 / (2 r_i) x0_{i-1}

    and held through all the fine steps of the block, by which all registers of the plan are
    carried along.  For DDIM, whichever the prediction type, that makes the step of the paper:
    ``x = sigma_t / sigma_s x - alpha_t (e^(-h) - 1) v``.

    Source: DPM-Solver++ (Lu et al. 2022), Algorithm 2.
    """

    def __init__(self, plan: Plan, bounds: Sequence[int], device: torch.device) -> None:
        """Composes the steps of every block with the data prediction held.

        See `Hold` for the arguments.

        Raises:
            ValueError: The plan has a threshold, does not know its lambda, or does not show what
                the model predicts, as no stochastic one does.
        """
        super().__init__(plan, bounds, device)
        maps = data_maps(plan)
        if maps is None:
            why = ", for it is stochastic" if plan.stochastic else ""
            raise ValueError(
                f"SRDS: {plan.name} does not show what the model predicts{why}; the coarse solver "
                "extrapolates x0, expected a plan that shows it, or coarse='krylov'"
            )
        self._maps = maps[list(bounds[:-1])].tolist()
        R, held = plan.registers, []
        for first, last in pairwise(bounds):
            total = np.eye(R, R + 1)  # of [registers at the start; x0]
            for (a, b), matrix in zip(maps[first:last], plan.matrices[first:last], strict=True):
                of_state, of_output = matrix[:, :R].copy(), matrix[:, R]
                of_state[:, 0] -= of_output * (a / b)  # u = (x0 - a x) / b
                total = of_state @ total
                total[:, R] += of_output / b
            held.append(total)
        self._held = torch.tensor(np.stack(held), dtype=torch.float64, device=device)

    def value(
        self,
        block: int,
        x: Tensor,  # [...]
        u: Tensor,  # [...]
    ) -> Tensor:  # [...]
        """x0 at the start of a block, counted from 0."""
        a, b = self._maps[block]
        return a * x + b * u


class TwoStepKrylov(TwoStep):
    """The first guess of `TwoStep`, the correction of `Krylov`."""

    throughout = False

    def __init__(self, plan: Plan, bounds: Sequence[int], device: torch.device) -> None:
        """Makes both; see `TwoStep` for the arguments and errors."""
        super().__init__(plan, bounds, device)
        self._krylov = Krylov(plan, bounds, device)

    def correction(
        self,
        blocks: Sequence[int],  # [n]
        gram: Tensor,  # [n, R + 1, R + 1]
    ) -> Tensor:  # [n, R, R + 1] fp64
        """C of each row, from the differences of the outputs themselves."""
        return self._krylov.correction(blocks, gram)

    def held(
        self,
        blocks: Sequence[int],  # [n]
    ) -> Tensor:  # [n, R, R + 1] fp64
        """C as "hold" has it, of the outputs themselves."""
        return self._krylov.start(blocks)


def _look_ahead(
    starts: np.ndarray,  # [B]
) -> list[float]:  # [B]
    """``1 / (2 r)`` of each block from lambda at the starts of all, 0 for first order."""
    weights = np.zeros(len(starts))
    with np.errstate(invalid="ignore", divide="ignore"):
        length = np.diff(starts)
        weights[1:-1] = length[1:] / (2 * length[:-1])
    weights[~(np.isfinite(weights) & (weights > 0))] = 0.0
    found: list[float] = weights.tolist()
    return found


def _dot(
    left: Tensor,  # [n, V]
    inner: Tensor,  # [n, V, V]
    right: Tensor,  # [n, V]
) -> Tensor:  # [n, 1]
    """The inner product of two vectors given in terms of the differences.

    Sums rather than products of matrices: a row's result does not depend on how many there are.
    """
    return (left[:, :, None] * inner * right[:, None]).sum((1, 2))[:, None]


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where there is nothing to divide by."""
    return torch.where(denominator != 0, numerator / denominator, 0.0)


def output_slopes(plan: Plan) -> np.ndarray | None:  # [K, 2]
    """``du = (gain G + shift) dx`` of every step, with ``G dx = sigma deps`` of the model's input.

    G falls where the noise is less than the spread s of the data: it is taken to go like
    ``1 / (1 + s^2 e^(2 lambda))``, as for Gaussian data, and stands here without that factor.

    None where the plan does not know its lambda or what the model predicts, as for all stochastic
    plans. 0 where the output does not tell the noise, as at pure noise with v prediction.
    """
    prediction = infer_prediction(plan)
    if prediction is None or plan.log_snr is None:
        return None
    slopes = []
    for snr, scale in zip(plan.log_snr.tolist(), plan.input_scales.tolist(), strict=True):
        noise = math.exp(-min(max(snr, -30.0), 30.0))  # sigma / alpha
        alpha = 1 / (1 + noise) if prediction == "flow_prediction" else 1 / math.hypot(1, noise)
        of_input, of_output = find_prediction(prediction).noise(alpha, alpha * noise)
        if abs(of_output) < 1e-9:
            slopes.append((0.0, 0.0))
        else:
            left = 1 / (1 + (SPREAD / noise) ** 2)  # of G
            slopes.append(
                (left * scale / (alpha * noise * of_output), -of_input * scale / of_output)
            )
    return np.array(slopes)


COARSE: dict[str, type[Hold]] = {
    "krylov": Krylov,
    "hold": Hold,
    "2m": TwoStep,
    "2m-krylov": TwoStepKrylov,
    "extrapolate": Extrapolate,
}
"""The coarse solvers by name, the default first."""
