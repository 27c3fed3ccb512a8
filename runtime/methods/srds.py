"""SRDS: the fine solves of all blocks of a trajectory at once, corrected until they agree.

Selvam et al., "Self-Refining Diffusion Samplers: Enabling Parallelization via Parareal Iterations",
NeurIPS 2024 (arXiv 2412.08292).  The N steps of a plan are cut into B blocks.  With x_i^p the whole
state (all registers) at the end of block i in iterate p, u_i^p the model's output at its start, and
F the plan itself over the block:

    x_i^0 = the coarse solver's guess, block by block                  (one model call a block)
    x_i^p = F(x_{i-1}^{p-1}) + C_i ([x_{i-1}^p; u_i^p] - [x_{i-1}^{p-1}; u_i^{p-1}])

where C_i, the coarse solver's correction (`sidestep.runtime.methods.coarse`), says how a change of
the block's start moves its end; u_i^p is the first of the fine evaluations of the next iteration.
The correction is added last and is exactly 0 where nothing has changed: after iteration p the first
p blocks equal the serial sampler bit for bit, and after B of them all do (with a tolerance of 0).

What runs when is decided in `csrc/core/parareal.cpp`: iteration p + 1 follows iteration p block by
block, so that K iterations take K (m - 1) + B ticks for blocks of m steps, never more than N.

A block whose start has hardly moved does not start again: while rms(x_{i-1}^p - y) is below
tolerance / (16 B), where y is what block i has started from last, that run serves for iterate p as
well.  So iterations die out from the left, and those that are begun before it is known that they
are not needed cost less.  All starts together are then off by a sixteenth of the tolerance at most;
what they are off counts in the estimate below, as if nothing made it grow.  With a tolerance of 0
nothing is left out, and only then all B iterations are exact.

With early exits the runs from the first guesses x_i^0, but for x_0 itself, are drafts: the model is
cut short in them, u_i^0 and F both.  What the exits leave out goes out of x_i^1 as far as it is the
same over a block, because both are in the difference

    x_i^1 = F'(x_{i-1}^0) + H ([x_{i-1}^1; u_i^1] - [x_{i-1}^0; u_i'^0])

with H that of "hold": "krylov" would take the error of u' for a Jacobian.  All later runs are
whole: no draft serves for another iterate, no image stops at iterate 1, and since block 1 starts
from x_0 iterate B is the serial sampler's, whatever the exits.

An image stops by itself, when the error that it has left is estimated below the tolerance.  The
pipelining shows how the iteration contracts before it is needed: when x_B^p arrives, iteration
p + 1 has already passed most of the boundaries, and there

    D_i^p = rms(x_i^p - x_i^{p-1}),    rho = max over the last of them of D_i^{p+1} / D_i^p,
    error <= max(D_i^{p+1} / (1 - rho) there, rho / (1 - rho) D_i^p elsewhere)

with rho extended by its growth from boundary to boundary to those that are not passed yet, no less
than in the iteration before, and 0.1 added for doubt.  It is an estimate, from above on most
samples: tests count how many.  Where no change is greater than a quarter of the tolerance twice in
a row, four of them are the estimate: what is left may be the rounding of a model whose results
depend on the size of its batch, which does not contract.  All boundaries count, so that a picture
that happens to stand still while its beginning has not converged goes on.  Which of them are looked
at follows from the schedule for unlimited width, so that the result does not depend on how many
blocks share a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import SupportsIndex

import numpy as np

from sidestep.runtime.methods.coarse import COARSE
from sidestep.runtime.methods.early_exit import EarlyExit
from sidestep.runtime.methods.spacing import log_snr_bounds
from sidestep.runtime.methods.srds_blocks import default_blocks, equal_bounds
from sidestep.runtime.plan import Plan

_LOOKED_AT = 4  # boundaries, the last that show a contraction
_DOUBT = 0.1  # added to rho: no iteration is trusted to leave less than a tenth
_WORST = 0.95  # rho above which nothing is foretold
_RESTART = 16  # all starts together may be off by the tolerance divided by this
_STILL = 4  # a change this much below the tolerance, twice and everywhere, is the model's own noise
_ROUNDING = 1e-6  # root mean square below which a quotient of residuals says nothing
_LEAST = 1e-9  # a change, however small, is none of 0

SPACINGS = ("steps", "log-snr")
"""In what blocks are of nearly equal length."""


@dataclass(frozen=True, kw_only=True)
class SRDS:
    """Settings of SRDS.

    Attributes:
        blocks: How many blocks of nearly equal length, or where they begin and end: whole numbers
            from 0 to the number of steps. None for what the planner picks for a device on which a
            call for all blocks takes as long as one for one (`default_blocks`); `sidestep.auto`
            picks by what it measures.
        tolerance: Root mean square of the error in the latents (float32, clean latents of unit
            variance) at which an image stops. 0 stops when nothing changes any more, bit for bit.
        max_iterations: Most iterations; None for as many as there are blocks, after which the
            result is exact if the tolerance is 0.
        exact: The same as a tolerance of 0: every image equals the serial sampler's, bit for bit,
            with a model whose result does not depend on the size of the batch.
        coarse: The coarse solver, a name in `COARSE`.
        spacing: In what the blocks are of nearly equal length, of `SPACINGS`: in steps, or in the
            log-SNR, which the plan has to know. Where their bounds are given, "steps".
        width: Most evaluations in a model call for each image that is made, where sidestep makes
            the calls (`sidestep.enable`, and each of the `Ranks`); None for all that are ready, one
            for each block and one more. The result does not depend on it. An `Engine` has its
            capacity.
        exits: Early exits of the first iteration's evaluations, by their static plan: fewer blocks
            of the model, for a rougher first iterate. For `sidestep.enable`; the host of an
            `Engine` is told which evaluations may be cut short (`Batch.coarse`).

    Raises:
        ValueError: A setting is out of range.
        TypeError: The exits are none.
    """

    blocks: int | Sequence[int] | None = None
    tolerance: float = 0.05
    max_iterations: int | None = None
    exact: bool = False
    coarse: str = "krylov"
    spacing: str = "steps"
    width: int | None = None
    exits: EarlyExit | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.tolerance, int | float) and 0 <= self.tolerance < math.inf):
            raise ValueError(f"SRDS: tolerance is {self.tolerance!r}, expected 0 or more")
        for name in ("max_iterations", "width"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if isinstance(self.blocks, Sequence) and not isinstance(self.blocks, str):
            object.__setattr__(self, "blocks", tuple(_whole("blocks", b, 0) for b in self.blocks))
        else:
            object.__setattr__(self, "blocks", _whole("blocks", self.blocks))
        if self.exact and self.max_iterations is not None:
            raise ValueError(
                f"SRDS: exact with max_iterations={self.max_iterations}, expected one of the two"
            )
        if self.coarse not in COARSE:
            known = ", ".join(map(repr, COARSE))
            raise ValueError(f"SRDS: coarse is {self.coarse!r}, expected one of: {known}")
        if self.spacing not in SPACINGS:
            known = ", ".join(map(repr, SPACINGS))
            raise ValueError(f"SRDS: spacing is {self.spacing!r}, expected one of: {known}")
        if self.spacing != "steps" and isinstance(self.blocks, Sequence):
            raise ValueError(
                f"SRDS: spacing is {self.spacing!r} and blocks are {list(self.blocks)}, expected a "
                "number of blocks to be spaced so, or None"
            )
        self._check_exits()

    def _check_exits(self) -> None:
        if self.exits is None:
            return
        if not isinstance(self.exits, EarlyExit):
            raise TypeError(f"SRDS: exits is {self.exits!r}, expected sidestep.EarlyExit(...)")
        if self.exits.mode != "static" or self.exits.reuse not in (None, False):
            raise ValueError(
                f"SRDS: exits have mode {self.exits.mode!r} and reuse={self.exits.reuse!r}, "
                "expected mode 'static' without: rows of one image are at many steps at once"
            )
        if self.max_iterations == 1:
            raise ValueError(
                "SRDS: exits with max_iterations=1, expected 2 or more: the first iteration is the "
                "one that is cut short"
            )

    def bounds(self, plan: Plan | int) -> tuple[int, ...]:  # [B + 1]
        """Where the blocks of a plan begin and end, 0 and its number of steps included.

        Args:
            plan: The plan; with the spacing "steps" its number of steps suffices.

        Raises:
            ValueError: There are more blocks than steps, the given bounds are no bounds, or the
                plan does not know its log-SNR where blocks are spaced by it.
        """
        steps = len(plan) if isinstance(plan, Plan) else plan
        if self.spacing == "log-snr":
            return log_snr_bounds(self._log_snr(plan), self._count(steps))
        if isinstance(self.blocks, Sequence):
            if sorted({0, *self.blocks, steps}) != list(self.blocks):
                raise ValueError(
                    f"SRDS: blocks are {list(self.blocks)}, expected ascending bounds from 0 to "
                    f"{steps}"
                )
            return tuple(self.blocks)
        return equal_bounds(steps, self._count(steps))

    def _count(self, steps: int) -> int:
        """B of a plan of so many steps.

        Raises:
            ValueError: There are more blocks than steps.
        """
        assert not isinstance(self.blocks, Sequence)
        count = int(self.blocks or 0) or default_blocks(steps)
        if count > steps:
            raise ValueError(f"SRDS: {count} blocks of {steps} steps, expected at most {steps}")
        return count

    def _log_snr(self, plan: Plan | int) -> np.ndarray:  # [N]
        """What blocks are spaced by.

        Raises:
            ValueError: It is not known.
        """
        found = plan.log_snr if isinstance(plan, Plan) else None
        if found is None or np.isnan(found).any():
            name = plan.name if isinstance(plan, Plan) else f"a number of steps, {plan},"
            raise ValueError(
                f"SRDS: spacing is 'log-snr', and {name} does not tell its log-SNR, expected a "
                "plan that does, or spacing='steps'"
            )
        return found

    @property
    def drafts(self) -> int:
        """Iterates that come from runs which are cut short: 1 with exits."""
        return 0 if self.exits is None else 1

    @property
    def allowed(self) -> float:
        """The tolerance, 0 where it is to be exact."""
        return 0.0 if self.exact else self.tolerance

    def iterations(self, blocks: int) -> int:
        """Most iterations over so many blocks."""
        return min(blocks, self.max_iterations or blocks)

    def rows(self, steps: int) -> int:
        """Evaluations of one image that are in a model call, at most."""
        return min(self.width or steps, len(replace(self, spacing="steps").bounds(steps)))

    def check(self, plan: Plan) -> None:
        """Refuses what is no linear program.

        Raises:
            ValueError: The plan has a threshold, or the blocks do not fit it.
        """
        if plan.threshold is not None:
            raise ValueError(
                f"SRDS: {plan.name} has a threshold, which is not linear, expected a plan without"
            )
        self.bounds(plan)


def _whole(name: str, value: object, least: int = 1) -> int | None:
    """A setting as a whole number, or None.

    Raises:
        ValueError: It is none, or too small.
    """
    if value is None:
        return None
    if isinstance(value, SupportsIndex) and not isinstance(value, bool) and index(value) >= least:
        return index(value)
    raise ValueError(f"SRDS: {name} is {value!r}, expected a whole number of {least} or more")


class Stop:
    """Estimates the error of an image from its residuals, and says when it is small enough."""

    def __init__(self, settings: SRDS, bounds: Sequence[int]) -> None:
        """For one trajectory.

        Args:
            settings: With the tolerance.
            bounds: ``[B + 1]`` of the blocks.
        """
        self.tolerance = settings.allowed
        self.blocks = len(bounds) - 1
        self._least = self.tolerance / (_RESTART * self.blocks)
        self.most = settings.iterations(self.blocks)
        self._drafts = settings.drafts
        self._ticks = formation_ticks(bounds, self.most + 1)

    def moved(self, change: float, iterate: int) -> bool:
        """Whether a boundary that is so far from where the next block has started starts it again.

        Args:
            change: Root mean square.
            iterate: Of the boundary; after a draft every block starts again.
        """
        return iterate <= self._drafts or not change < self._least

    def needed(self, iterate: int) -> int:
        """Boundaries 1 .. this of the next iterate are to be known before `error` is asked."""
        if iterate >= self.most:
            return 0
        end = self._ticks[iterate, self.blocks]
        passed = int(np.count_nonzero(self._ticks[iterate + 1, 1 : self.blocks] <= end))
        return passed if passed > iterate else 0  # those up to the iterate are exact

    def error(
        self,
        residuals: np.ndarray,  # [most + 2, B + 1], D_i^p at [p, i]; 0 where there is none, p > i
        iterate: int,
    ) -> float:
        """Estimated root mean square of the error of x_B^p; infinite while nothing is known."""
        neglected = self._neglected(residuals, iterate)
        if iterate >= self.blocks:
            return neglected
        if iterate <= self._drafts:
            return math.inf
        now, known = residuals[iterate, 1:], self.needed(iterate)
        after = residuals[iterate + 1, 1 : known + 1]
        if now.max() <= self._least:  # nothing has moved, and nothing will
            return float(now.max()) + neglected
        told = self._contraction(residuals, iterate, known)
        rho = math.inf if told is None else told + _DOUBT
        found = math.inf
        if rho < _WORST:
            seen = float(after.max(initial=0.0)) / (1 - rho)
            found = max(seen, float(now[known:].max(initial=0.0)) * rho / (1 - rho), _LEAST)
            found += neglected
        still = _STILL * float(residuals[max(1, iterate - 1) : iterate + 2].max())
        return min(found, still + neglected) if iterate > 1 else found

    def _neglected(self, residuals: np.ndarray, iterate: int) -> float:
        """What the starts of all blocks together are off their boundaries."""
        exact = residuals.diagonal()[1 : min(iterate, self.blocks)]
        others = residuals[iterate, max(1, iterate) : self.blocks]
        own = [(off, p) for p, off in enumerate(exact, start=1)]
        own += [(off, iterate) for off in others]
        return float(sum(off for off, p in own if not self.moved(off, p)))

    def enough(self, error: float) -> bool:
        """Whether an image with that error may stop."""
        return error <= self.tolerance

    def _contraction(self, residuals: np.ndarray, iterate: int, known: int) -> float | None:
        """rho at the last boundary, None where nothing tells it.

        The greater of two: from where the next iteration has been, extended by its steepest growth
        from boundary to boundary to those that it has not reached; and that of the last iteration,
        for one that contracts more at once may have been lucky.
        """
        before, now, after = residuals[max(0, iterate - 1) : iterate + 2]
        found = []
        told = self._quotients(now[iterate + 2 : known + 1], after[iterate + 2 : known + 1])
        if len(told):
            growth = float(np.diff(told).max(initial=0.0))
            found.append(float(told.max()) + growth * (self.blocks - known))
        told = self._quotients(before[iterate + 1 :], now[iterate + 1 :])
        if iterate > 1 and len(told):
            found.append(float(told.max()))
        return max(found, default=None)

    def _quotients(
        self,
        before: np.ndarray,  # [n]
        after: np.ndarray,  # [n]
    ) -> np.ndarray:  # [at most _LOOKED_AT]
        """``after / before`` of the last boundaries where it says something."""
        said = before > max(_ROUNDING, self._least)
        quotients: np.ndarray = after[said] / before[said]
        return quotients[-_LOOKED_AT:]


def formation_ticks(bounds: Sequence[int], most: int) -> np.ndarray:  # [most + 1, B + 1]
    """T(i, p): after how many ticks x_i^p is there if all blocks that can run do.

        T(i, 0) = i,    T(i, p) = max(T(i-1, p-1) + m_i, T(i-1, p) + 1),    T(0, p) = 0

    and x_i^p for p > i, which is x_i^i, is there with it.
    """
    ticks = np.zeros((most + 1, len(bounds)), dtype=np.int64)
    for i in range(1, len(bounds)):
        length = bounds[i] - bounds[i - 1]
        ticks[0, i] = i
        for p in range(1, most + 1):
            later = 0 if p >= i else ticks[p, i - 1] + 1
            ticks[p, i] = max(ticks[p - 1, i - 1] + length, later) if p <= i else ticks[p - 1, i]
    return ticks
