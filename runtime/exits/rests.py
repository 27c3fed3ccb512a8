"""What lies behind the exits, of the last two whole calls, and how it goes on (`menu`).

r_i = h_L - h_i
h' = h_i + (1 + w) r_i(b) - w r_i(a),        w = (lambda - lambda_b) / (lambda_b - lambda_a)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.runtime.exits.plan import StaticPlan


class Rests:
    """Rests of every call that the host makes at each step, as a plan needs them."""

    def __init__(self, plan: StaticPlan, log_snr: Sequence[float], whole: int) -> None:
        """Has seen nothing yet.

        Args:
            plan: Which steps go on with the rest of which exit.
            log_snr: ``[T]`` lambda of the steps.
            whole: K, which stands for the whole model in the plan.
        """
        self._plan, self._snr, self._whole = plan, log_snr, whole
        self._wanted = {exit for exit, rest in zip(plan.exits, plan.rests, strict=True) if rest}
        self._step = 0
        self._places: tuple[int, ...] = ()  # after the number of the call
        self._kept: dict[tuple[int, ...], list[tuple[int, dict[int, Tensor]]]] = {}  # newest first
        self._seen: dict[int, Tensor] = {}

    def forget(self) -> None:
        """Frees everything."""
        self._kept, self._seen = {}, {}

    def open(self, step: int, call: int, places: Sequence[int]) -> None:
        """A call of the model begins, of the step's the one of this number, with these rows."""
        self._step, self._places = step, (call, *places)
        self._seen = {}

    def see(self, exit: int, hidden: Tensor) -> None:  # [n, N, D]
        """All rows of the call have come to an exit."""
        planned = self._step < len(self._plan.exits)
        if planned and self._plan.exits[self._step] == self._whole and exit in self._wanted:
            self._seen[exit] = hidden

    def land(self, hidden: Tensor) -> None:  # [n, N, D]
        """All rows of the call have come to the end."""
        if self._seen:
            rests = {exit: hidden - seen for exit, seen in self._seen.items()}
            kept = self._kept.setdefault(self._places, [])
            self._kept[self._places] = [(self._step, rests), *kept[:1]]
            self._seen = {}

    @property
    def due(self) -> bool:
        """Whether rows that leave this call go on with a rest."""
        return self._step < len(self._plan.rests) and self._plan.rests[self._step]

    @property
    def ready(self) -> bool:
        """Whether the last two whole calls that the plan counts on were made for these rows."""
        whole = [k for k in range(self._step) if self._plan.exits[k] == self._whole]
        kept = [step for step, _ in self._kept.get(self._places, [])]
        return len(whole) > 1 and kept == whole[:-3:-1]

    def add(self, exit: int, hidden: Tensor) -> Tensor:  # [n, N, D]
        """h' of rows that leave there."""
        (b, newest), (a, older) = self._kept[self._places]
        w = slope(self._snr, self._step, b, a)
        wide = torch.add(hidden.float(), newest[exit].float(), alpha=1 + w)
        return wide.sub_(older[exit].float(), alpha=w).to(hidden.dtype)


def slope(log_snr: Sequence[float], step: int, b: int, a: int) -> float:
    """w; 0 where lambda_a is at the pure end of a schedule."""
    return (log_snr[step] - log_snr[b]) / (log_snr[b] - log_snr[a])
