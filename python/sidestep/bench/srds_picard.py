"""ParaDiGMS, the baseline of ``sidestep bench srds``: Picard iteration over a sliding window.

Shih et al., "Parallel Sampling of Diffusion Models", NeurIPS 2023, Algorithm 1 (arXiv 2305.16317).
With Phi_k the step k of a sampler that keeps nothing but x, and a window of steps from ``first``,

    x_{k+1}' = x_first + sum_{j=first..k} (Phi_j(x_j) - x_j)             all k of the window at once

after which the window goes on to the first point j that has changed by more than is allowed,

    mean((x_j' - x_j)^2) > tolerance^2 V_j
    V_j = sigma_{j+1}^2 (1 - exp(2 (lambda_j - lambda_{j+1})))

where V_j is the variance of the noise that a step of DDPM adds there.  x_{first+1}' is exact, so
that the window moves at least one step a tick.  The published pipeline moves it for a whole batch
at once; here every image has a window of its own, as it has with SRDS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestep.adapters.denoiser import GuidedDenoiser
from sidestep.runtime.plan import Plan

PUBLISHED = 0.1
"""The tolerance of the published pipeline."""

STRICT = 0.03
"""One that comes nearer to the serial sampler, to compare."""

Rows = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""``model(x, t, images) -> u``: latents ``[m, ...]``, their times ``[m]``, whose they are."""


@dataclass(frozen=True, kw_only=True)
class ParaDiGMS:
    """Settings of ParaDiGMS.

    Attributes:
        window: p, the steps that are evaluated at once.
        tolerance: Change of a point, in units of the sampler's noise, that counts as none.

    Raises:
        ValueError: A setting is out of range.
    """

    window: int
    tolerance: float = PUBLISHED

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"ParaDiGMS: window is {self.window}, expected 1 or more")
        if not self.tolerance >= 0:
            raise ValueError(f"ParaDiGMS: tolerance is {self.tolerance}, expected 0 or more")


@dataclass(frozen=True, eq=False)
class Picard:
    """What it gave.

    Attributes:
        x: ``[n, ...]``, the latents after the last step.
        ticks: n sequential model calls of each image, which are its iterations.
        nfe: n model evaluations of each image.
    """

    x: Tensor
    ticks: list[int]
    nfe: list[int]


def picard(
    settings: ParaDiGMS,
    plan: Plan,
    model: Rows,
    x: Tensor,  # [n, ...]
    advance: Callable[[], None] = lambda: None,
) -> Picard:
    """Samples n images, the windows of all of them in one model call.

    Args:
        settings: Window and tolerance.
        plan: A sampler of N steps that keeps nothing but x.
        model: The model.
        x: ``[n, ...]``, unit noise times ``plan.initial_scale``.
        advance: Called for every step that all images have behind them, for a progress bar.

    Raises:
        ValueError: It is another kind of plan.
    """
    check_plan(plan)
    steps, count = len(plan), len(x)
    allowed = torch.tensor(settings.tolerance**2 * noise_variances(plan), dtype=torch.float32)
    table = torch.tensor(plan.matrices[:, 0, :2], dtype=x.dtype).T.reshape(2, -1, *[1] * x[0].dim())
    scales = torch.tensor(plan.input_scales, dtype=x.dtype).reshape(-1, *[1] * x[0].dim())
    times = torch.tensor(plan.timesteps, dtype=torch.float32)
    path = x[:, None].repeat(1, steps + 1, *[1] * x[0].dim())  # [n, N + 1, ...]
    first, ticks, nfe = [0] * count, [0] * count, [0] * count
    while active := [i for i in range(count) if first[i] < steps]:
        behind = min(first)
        lasts = [min(first[i] + settings.window, steps) for i in active]
        sizes = [last - first[i] for i, last in zip(active, lasts, strict=True)]
        images = [i for i, size in zip(active, sizes, strict=True) for _ in range(size)]
        k = torch.cat([torch.arange(first[i], last) for i, last in zip(active, lasts, strict=True)])
        old = path[images, k]
        u = model(scales[k] * old, times[k], images)
        ends = table[0, k] * old + table[1, k] * u
        for i, end in zip(active, ends.split(sizes), strict=True):
            ticks[i] += 1
            nfe[i] += len(end)
            first[i] += slide(path[i], end, first[i], allowed)
        for _ in range(min(first) - behind):
            advance()
    return Picard(path[:, -1], ticks, nfe)


def slide(
    path: Tensor,  # [N + 1, ...]
    ends: Tensor,  # [p, ...]
    first: int,
    allowed: Tensor,  # [N]
) -> int:
    """One Picard iteration of a window, written into ``path``.

    Args:
        path: The points x_0 .. x_N.
        ends: Phi_k(x_k) of the steps k of the window.
        first: The window's first step.
        allowed: The mean square by which each point may change.

    Returns:
        How many steps the window moves.
    """
    last = first + len(ends)
    new = [path[first]]
    for k, end in enumerate(ends, first):
        # x_k' + (Phi_k(x_k) - x_k), so associated that it is Phi_k(x_k) where nothing has changed
        new.append(end + (new[-1] - path[k]))
    points = torch.stack(new[1:])
    changes = (points - path[first + 1 : last + 1]).flatten(1).square().mean(1)
    settled = changes[:-1] <= allowed[first + 1 : last]
    stride = 1 + int(settled.int().cumprod(0).sum())
    path[first + 1 : last + 1] = points
    path[last + 1 : last + 1 + stride] = points[-1]
    return stride


def noise_variances(plan: Plan) -> np.ndarray:  # [N]
    """V_j of every step; the last, whose noise is none or next to none, has that before it."""
    assert plan.log_snr is not None
    now, later = plan.log_snr[:-1], plan.log_snr[1:]
    exploding = plan.initial_scale != 1  # as Euler's latents are, else of constant variance
    variance = np.exp(-2 * later) if exploding else 1 / (1 + np.exp(2 * later))
    found = -np.expm1(2 * (now - later)) * variance
    return np.concatenate([found, found[-1:]])


def check_plan(plan: Plan) -> None:
    """Refuses what is no sequence of maps of x.

    Raises:
        ValueError: The plan keeps more than x from step to step, draws noise, has a threshold, or
            does not know its noise levels.
    """
    if plan.registers > 1:
        wrong = f"keeps {plan.registers} registers"
    elif plan.stochastic:
        wrong = "draws noise"
    elif plan.threshold is not None:
        wrong = "has a threshold"
    elif plan.log_snr is None:
        wrong = "does not know its noise levels"
    else:
        return
    raise ValueError(
        f"ParaDiGMS: {plan.name} {wrong}, expected a deterministic sampler that keeps nothing but "
        "x, such as DDIM"
    )


class Denoiser:
    """The guided model of a pipeline for rows of several prompts, each at a time of its own."""

    def __init__(self, pipe: Any, prompts: list[str], guidance: float) -> None:
        """Encodes the prompts once.

        Args:
            pipe: A Stable Diffusion pipeline.
            prompts: One for every image.
            guidance: The guidance scale.
        """
        self._denoiser: Any = GuidedDenoiser(pipe, prompts, guidance)
        self._embeddings = self._denoiser.embeddings.unflatten(0, (-1, len(prompts)))

    def __call__(
        self,
        x: Tensor,  # [m, C, h, w]
        t: Tensor,  # [m]
        images: Sequence[int],  # [m]
    ) -> Tensor:  # [m, C, h, w]
        """The guided predictions."""
        self._denoiser.embeddings = self._embeddings[:, images].flatten(0, 1)
        prediction: Tensor = self._denoiser(x, t.repeat(len(self._embeddings)))
        return prediction
