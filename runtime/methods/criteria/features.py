"""The relative change of the model's own output, the last of its features.

With the newest computed outputs u_i of step i and u_j of the step j < i computed before it,

    v = mean |u_i - u_j| / (mean |u_i| (i - j))

is the relative change per step.  It stands until the next computed output comes, so that the debt
of a run of s skips is s v.  A driver hands over the output that the solver stepped with, guidance
combined; features of inner layers would need hooks in the model, and are not used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sidestep.runtime.methods.criteria.gate import Gate, Gated, row_mean
from sidestep.runtime.methods.criteria.outputs import ComputedOutputs, per_row
from sidestep.runtime.methods.criterion import Observation


class Features(Gated):
    """v as above. Keeps each row's newest computed output."""

    DEFAULTS = Gate(threshold=0.15)
    reads_output = True

    def begin(self) -> None:
        """Forgets the outputs."""
        self._kept = ComputedOutputs(self.course.rows, 1)
        self._change: Tensor | None = None  # v, [rows] fp32

    def measure(self, seen: Observation) -> Tensor | None:
        """v of every row; None before its second computed output."""
        assert seen.output is not None
        output = seen.output.float()
        if self._kept.outputs and any(seen.computed):
            gaps = per_row(self._kept.gaps(seen.step), output)
            change = row_mean(output - self._kept.outputs[0]) / (row_mean(output) * gaps)
            old = torch.full_like(change, torch.nan) if self._change is None else self._change
            self._change = torch.where(per_row(seen.computed, output), change, old)
        if any(seen.computed):
            self._kept.put(output, seen)
        return self._change
