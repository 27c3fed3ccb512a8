"""A weighted average of the scalar third difference over the last few steps.

    v_k = sum_i w_i r_{k-i} / sum_i w_i        r_k = xi_k / delta_{k-1},  w_i = 2^-i,  i = 0 .. 3

with fewer terms where fewer are known.  One quiet step in a restless stretch does not skip, and
the values before a run of skips, where r goes blind, still count in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sidestep.runtime.methods.criteria.gate import Gate, Gated
from sidestep.runtime.methods.criteria.third_difference import StepSizes
from sidestep.runtime.methods.criterion import Observation

WINDOW = 4  # steps
DECAY = 0.5  # of the weight, per step back


class Windowed(Gated):
    """v as above; r is `ThirdDifference`'s number."""

    DEFAULTS = Gate(threshold=0.05)

    def begin(self) -> None:
        """Forgets the step sizes and the window."""
        self._sizes = StepSizes()
        self._window: list[Tensor] = []  # r, [rows] fp32 each, newest first

    def measure(self, seen: Observation) -> Tensor | None:
        """v_k of every row; None before the third step."""
        pair = self._sizes.put(seen.delta)
        if pair is None:
            return None
        self._window = [pair[0] / pair[1], *self._window[: WINDOW - 1]]
        values = torch.stack(self._window)  # [window, rows]
        weights = DECAY ** torch.arange(len(values), device=values.device)[:, None]
        return (weights * values).sum(0) / weights.sum()
