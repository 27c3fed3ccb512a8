"""The third-order difference of the latents themselves, element by element.

The scalar criterion takes the norm first and the difference afterwards, so that a change of
direction at equal step size looks stable.  Here the difference comes first.  With
d_k = x_{k+1} - x_k, elements a and means over them,

    v_k = mean_a |x_{k+1} - 3 x_k + 3 x_{k-1} - x_{k-2}|_a / (2 mean_a |x_k - x_{k-1}|_a)
        = mean_a |(d_k + d_{k-2}) / 2 - d_{k-1}|_a / mean_a |d_{k-1}|_a

which is the scalar xi_k / delta_{k-1} where the three steps are parallel.
"""

from __future__ import annotations

from torch import Tensor

from sidestep.runtime.methods.criteria.gate import Gate, Gated, row_mean
from sidestep.runtime.methods.criterion import Observation


class Elementwise(Gated):
    """v as above. Keeps the last two differences of the latents."""

    DEFAULTS = Gate(threshold=0.12)

    def begin(self) -> None:
        """Forgets the differences."""
        self._steps: list[Tensor] = []  # d, [rows, ...] fp32 each, oldest first

    def measure(self, seen: Observation) -> Tensor | None:
        """v_k of every row; None before the third step."""
        step = seen.x_next.float() - seen.x.float()
        kept, self._steps = self._steps, [*self._steps[-1:], step]
        if len(kept) < 2:
            return None
        before, previous = kept
        return row_mean((step + before) / 2 - previous) / row_mean(previous)
