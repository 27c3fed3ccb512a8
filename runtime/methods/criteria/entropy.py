"""The change of the latents' entropy.

The elements of a row are taken as samples of one normal distribution, whose entropy in nats is

    H(x) = 1/2 ln(2 pi e Var x)

A schedule changes H steadily by itself, so what is measured is how much that change changes,

    v_k = |H(x_{k+1}) - 2 H(x_k) + H(x_{k-1})|

in which the constant under the logarithm cancels.
"""

from __future__ import annotations

from torch import Tensor

from sidestep.runtime.methods.criteria.gate import Gate, Gated
from sidestep.runtime.methods.criterion import Observation


class Entropy(Gated):
    """v as above. Keeps two numbers a row."""

    DEFAULTS = Gate(threshold=0.003)

    def begin(self) -> None:
        """Forgets the entropies."""
        self._entropies: list[Tensor] = []  # H up to its constant, [rows] fp32 each, oldest first

    def measure(self, seen: Observation) -> Tensor | None:
        """v_k of every row; None before the second step."""
        if not self._entropies:
            self._entropies = [entropy(seen.x)]
        self._entropies = [*self._entropies[-2:], entropy(seen.x_next)]
        if len(self._entropies) < 3:
            return None
        before, previous, current = self._entropies
        return (current - 2 * previous + before).abs()


def entropy(x: Tensor) -> Tensor:  # [rows, ...] -> [rows] fp32
    """``1/2 ln Var x`` of each row: H without its constant."""
    return 0.5 * x.float().flatten(1).var(1, correction=0).log()
