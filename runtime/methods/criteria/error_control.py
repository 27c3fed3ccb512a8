"""Error control: skip while the predicted error of the finished picture stays small.

A computed step b shows, beside the output u_b, the output u*_b that would have been reused there.
Their distance is the embedded error estimate of the extrapolation, as between two orders of a
multistep solver.  For one step ahead, over the two last computed steps,

    e^2 = mean of (rms(u_b - u*_b) / (r^q rms(u_b)))^2      r: steps from the one before b to b

relative to the output.  Two samples are a noisy estimate: it is drawn halfway, in logarithm, to
what is usual, E.  The error grows with the distance, j^q for j steps ahead, and skipping step k,
j = k - b, moves the finished picture by about

    v_k = C_k rms(u_b) sqrt(e E) j^q            C_k: `carried_error`

Errors inside a run of skips point the same way, so that the gate adds them up, and a run ends when
the sum would pass the threshold.  An equal error for every run makes the sum over all runs least at
a given number of calls, if the error of a run grows with a power of its length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sidestep.runtime.methods.criteria.carried_error import carried_error
from sidestep.runtime.methods.criteria.gate import Gate, Gated
from sidestep.runtime.methods.criteria.outputs import per_row, push
from sidestep.runtime.methods.criteria.reused import gaps
from sidestep.runtime.methods.criterion import Observation

GROWTH = 0.8
"""q. Guided outputs change along a path between a straight line (1) and a random walk (1/2)."""

USUAL = 0.05
"""E, of a guided model at 50 steps. It only scales the threshold."""

_REMEMBERED = 2  # computed steps whose errors are averaged


class ErrorControl(Gated):
    """v as above. Keeps two errors a row."""

    DEFAULTS = Gate(
        threshold=0.009, max_skip=40, warm_up=3, protect_last=2, reuse="damped", gradual=True
    )
    reads_reused = True

    def begin(self) -> None:
        """Forgets the errors."""
        self._carried = carried_error(self.course)
        self._errors: list[Tensor] = []  # e^2 of one step each, [rows] fp32 each, newest first

    def measure(self, seen: Observation) -> Tensor | None:
        """v of every row; None before its second computed output."""
        reused = self.reused
        if any(seen.computed) and seen.step:
            fresh = per_row(seen.computed, reused.size)
            reach = [gap**GROWTH for gap in gaps(reused.steps)]
            error = reused.missed / (per_row(reach, fresh) * reused.size)
            self._errors = push(self._errors, error.square(), fresh)[:_REMEMBERED]
        if not self._errors:
            return None
        wanted = seen.step + 1
        carried = self._carried[min(wanted, len(self._carried) - 1)]
        reach = [carried * max(0, wanted - steps[0]) ** GROWTH for steps in reused.steps]
        error = torch.stack(self._errors).mean(0).sqrt()
        return reused.size * (error * USUAL).sqrt() * per_row(reach, error)
