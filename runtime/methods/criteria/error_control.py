"""Error control: skip while the predicted error of the finished picture stays small.

A computed step b shows, beside the output u_b, the output u*_b that would have been reused there.
Their distance is the embedded error estimate of the extrapolation, as between two orders of a
multistep solver.  For one step ahead, over the two last computed steps,

    e^2 = mean of (rms(u_b - u*_b) / (r^q rms(u_b)))^2      r: steps from the one before b to b

relative to the output.  Two samples are a noisy estimate: it is drawn halfway, in logarithm, to
what is usual, E.  The error grows with the distance, j^q for j steps ahead, and skipping step k,
j = k - b, moves the finished picture by about S_k g_k rms(u_b) sqrt(e E) j^q:

    g_k     how far step k carries an error of the output into the latents
    S_k     how much of an error of the latents is left in the picture

Errors inside a run of skips point the same way, so that the gate adds them up, and a run ends when
the sum would pass the threshold.  An equal error for every run makes the sum over all runs least at
a given number of calls, if the error of a run grows with a power of its length.  The solver's own
error falls with its number of steps K, and what may be added to it falls with it:

    v_k = (K / 50)^(3/4) S_k g_k rms(u_b) sqrt(e E) j^q

A run is at most one step longer than the run before it: a first error that happens to be small
must not decide a long stretch.

With lambda = ln(alpha / sigma), h = lambda_{k+1} - lambda_k, the exact solution of the diffusion
ODE over a step with a constant error of the data prediction x0 (DPM-Solver++, eq. 9), in units in
which alpha^2 + sigma^2 = 1, and the exact flow for Gaussian data of standard deviation s, give

    g_k = alpha_{k+1} (1 - e^-h) |d x0 / d u|,        S_k = s / (alpha sqrt(s^2 + e^-2lambda))

Single skips of 25 DDIM steps of the bundled model (a trial by hand, no command repeats it) moved
the picture by 0.6 to 1.2 times this from lambda = -1.6 on, by most in the last steps: hence S_k is
taken 1.6 times larger there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sidestep.runtime.methods.criteria.gate import Gate, Gated
from sidestep.runtime.methods.criteria.outputs import (
    ComputedOutputs,
    broadcast,
    per_row,
    push,
)
from sidestep.runtime.methods.criterion import Course, Observation
from sidestep.runtime.methods.reuse import HISTORY, reuse_weights, straightness
from sidestep.runtime.predictions import find_prediction

GROWTH = 0.8
"""q. Guided outputs change along a path between a straight line (1) and a random walk (1/2)."""

USUAL = 0.05
"""E, of a guided model at 50 steps. It only scales the threshold."""

SPREAD = 0.25
"""s. The finer structure of the data, which is decided late; its coarse structure has 1."""

LATE, LATE_WEIGHT = 0.4, 1.6
"""From this lambda on S_k is so much larger."""

_REMEMBERED = 2  # computed steps whose errors are averaged
_UNKNOWN_SHARE = 0.5  # of the line's change that comes true, before any was measured


class ErrorControl(Gated):
    """v as above. Keeps the computed outputs that the reuse rule looks at."""

    DEFAULTS = Gate(threshold=0.009, max_skip=40, warm_up=3, protect_last=2, reuse="damped")
    reads_output = True

    def begin(self) -> None:
        """Forgets the outputs and the errors."""
        self._carried = carried_error(self.course)
        self._kept = ComputedOutputs(self.course.rows, HISTORY[self.gate.reuse])
        self._errors: list[Tensor] = []  # e^2 of one step each, [rows] fp32 each, newest first
        self._size = self._share = torch.empty(0)  # rms(u_b); of the slope that came true: [rows]

    def measure(self, seen: Observation) -> Tensor | None:
        """v of every row; None before its second computed output."""
        assert seen.output is not None
        if any(seen.computed):
            self._take(seen.output.float(), seen)
        if not self._errors:
            return None
        wanted = seen.step + 1
        carried = self._carried[min(wanted, len(self._carried) - 1)]
        reach = [carried * _reach(steps, wanted) for steps in self._kept.steps]
        error = torch.stack(self._errors).mean(0).sqrt()
        return self._size * (error * USUAL).sqrt() * per_row(reach, error)

    def shares(self) -> list[Tensor]:
        """How much of the last change the line had foretold, where it is damped."""
        return [self._share] if self.gate.reuse == "damped" else []

    def damp(self, row: int, wanted: int, share: float) -> float:
        """The damping of the slope: what the last change says, or more on a short reach."""
        return max(share, straightness(self._kept.steps[row], wanted, self.course))

    def _take(self, output: Tensor, seen: Observation) -> None:
        """Compares the computed outputs with what would have been reused, and keeps them."""
        fresh = per_row(seen.computed, output)
        size = output.square().flatten(1).mean(1).sqrt()
        share = torch.full_like(size, _UNKNOWN_SHARE)
        if self._kept.outputs:
            moved = output - self._kept.outputs[0]
            foretold = self._foretold(seen.step)
            missed = moved - broadcast(self._damping(seen.step), moved) * foretold
            reach = [gap**GROWTH for gap in self._kept.gaps(seen.step)]
            error = missed.square().flatten(1).mean(1).sqrt() / (per_row(reach, size) * size)
            self._errors = push(self._errors, error.square(), fresh)[:_REMEMBERED]
            size = torch.where(fresh, size, self._size)
            share = torch.where(fresh, _share(moved, foretold), self._share)
        self._size, self._share = size, share
        self._kept.put(output, seen)

    def _foretold(self, step: int) -> Tensor:  # [rows, ...]
        """The change since the newest computed output that the reuse rule puts in for ``step``."""
        rule, snr = self.gate.reuse, self.course.log_snr
        rows = [reuse_weights(rule, steps, step, snr) for steps in self._kept.steps]
        return self._kept.combine([(row[0] - 1, *row[1:]) for row in rows])

    def _damping(self, step: int) -> Tensor:  # [rows]
        if self.gate.reuse != "damped":
            return torch.ones_like(self._share)
        least = [straightness(steps, step, self.course) for steps in self._kept.steps]
        return torch.maximum(self._share, per_row(least, self._share))


def _reach(steps: Sequence[int], wanted: int) -> float:
    """``j^q``; infinite where the run would be longer by more than one step than the one before."""
    ahead = wanted - steps[0]
    return math.inf if len(steps) > 1 and ahead > steps[0] - steps[1] else max(0, ahead) ** GROWTH


def _share(
    moved: Tensor,  # [rows, ...]
    foretold: Tensor,  # [rows, ...]
) -> Tensor:  # [rows]
    """The part of a foretold change that came true, by least squares, within 0 and 1."""
    product = (moved * foretold).flatten(1).sum(1)
    square = foretold.square().flatten(1).sum(1)
    return torch.where(square > 0, (product / square).clamp(0, 1), _UNKNOWN_SHARE)


def carried_error(course: Course) -> Sequence[float]:
    """``(K / 50)^(3/4) S_k g_k`` of every step.

    An unknown prediction type counts as epsilon. The last step ends at the clean picture. Where
    lambda is not known every step counts alike, ``S_k g_k = 1 / K``: 0.7 of their mean for epsilon.
    """
    if course.log_snr is None:
        steps = course.steps or 50
        return [(steps / 50) ** 0.75 / steps] * steps
    snr = np.append(np.asarray(course.log_snr, dtype=np.float64), math.inf)
    prediction = find_prediction(course.prediction or "epsilon")
    share = (len(course.log_snr) / 50) ** 0.75
    carried = []
    for now, after in pairwise(snr):
        noise = math.exp(-max(now, -30.0))  # sigma / alpha; -infinity at pure noise
        alpha = 1 / math.hypot(1, noise)
        scale = 1.0 if prediction.name == "edm" else alpha  # EDM's networks read x / alpha
        slope = prediction.data(scale, scale * noise)[1]
        ahead = after - now if now < math.inf else 0.0
        step = -math.expm1(-ahead) / math.hypot(1, math.exp(-after))
        left = SPREAD / (alpha * math.hypot(SPREAD, noise)) * (LATE_WEIGHT if now > LATE else 1)
        carried.append(share * left * step * abs(slope))
    return carried
