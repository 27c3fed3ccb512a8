"""Each row leaves by its own predicted error, within a budget of its own.

The damage that row b would do to its finished picture by leaving at exit i of step k,

    d = W_k exp(q90_i(b))        W_k: `plan`, q90: `Uncertainty`, of the guided output

is what it has to pay. The row leaves at the first exit with

    d <= min(E - spent_b, max(share_k, (E - spent_b) / (steps left)))

where share_k is what the static plan of the same budget E pays at step k. The guidance branches of
a row leave together. One read from the device at each exit. In the first step, before which nobody
knows what the rows are, all of them leave by the static plan and pay its share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.runtime.exits.file import Exits
from sidestep.runtime.exits.leaving import Rule, Sight, on
from sidestep.runtime.exits.plan import StaticPlan, translators_plan
from sidestep.runtime.methods.criterion import Course
from sidestep.runtime.upload import upload


class PerSample(Rule):
    """A ledger for each row."""

    KIND = "excess"
    THRESHOLD = 0.05

    def __init__(self, exits: Exits, threshold: float, **_others: object) -> None:
        """No trajectory runs yet."""
        self._exits = exits
        self._budget = threshold
        self._probes = exits.probes
        assert exits.uncertainty is not None
        self._uncertainty = exits.uncertainty
        self.start(Course())

    def start(self, course: Course) -> None:
        """Nobody has spent anything."""
        self._course = course
        self._plan: StaticPlan | None = translators_plan(self._exits, course, self._budget)
        self._snr: Tensor | None = None
        self.spent: dict[int, float] = {}  # by row, but for those of the first step
        self._first = 0.0  # what every row has spent besides, in the first step
        self._pending: dict[int, float] = {}

    def resume(self, course: Course, steps: int) -> None:
        """The plan goes on; every row may be the one that has spent most."""
        self._course, self._snr = course, None
        self._plan = None if self._plan is None else self._plan.after(steps)
        self._first += max(self.spent.values(), default=0.0)
        self.spent = {}

    def leave(self, sight: Sight) -> Sequence[bool] | None:
        """Rows whose damage is allowed; those that leave have spent it."""
        plan, k = self._plan, sight.step
        if plan is None or k >= len(plan.weights) or self._budget == 0:
            return None
        if sight.rows is None and k == 0 and plan.exits[0] == sight.exit:
            self._first = plan.damages[0]
            return [True] * len(sight.hidden)
        if sight.pairs is None:
            return None
        branches, rows = sight.pairs
        damages = self._damages(sight, branches, len(rows)).tolist()  # the read of this exit
        leaves = []
        for row, damage in zip(rows, damages, strict=True):
            leaves.append(damage <= self._allowed(plan, row, k))  # not so for what is no number
            if leaves[-1]:
                self._pending[row] = damage
        return leaves * branches

    def pay(self, row: int, step: int, damage: float) -> bool:
        """Whether the row may do so much damage at a step; it has then spent it."""
        plan = self._plan
        if (
            plan is None
            or step >= len(plan.weights)
            or not damage <= self._allowed(plan, row, step)
        ):
            return False
        self.spent[row] = self.spent.get(row, 0.0) + damage
        return True

    def _allowed(self, plan: StaticPlan, row: int, step: int) -> float:
        left = self._budget - self._first - self.spent.get(row, 0.0)
        return min(left, max(plan.damages[step], left / (len(plan.weights) - step)))

    def _damages(self, sight: Sight, branches: int, rows: int) -> Tensor:  # [rows]
        """d of every row."""
        assert self._plan is not None and self._course.log_snr is not None
        device = sight.hidden.device
        self._probes, self._uncertainty = on(device, self._probes), on(device, self._uncertainty)
        if self._snr is None or self._snr.device != device:
            self._snr = upload(list(self._course.log_snr), torch.float32, device)
        snr = self._snr[sight.step]
        scores = self._probes(sight.exit, sight.hidden, snr).unflatten(0, (branches, rows))
        q90 = self._uncertainty(sight.exit, scores, snr)[:, 1]
        return self._plan.weights[sight.step] * q90.exp()

    def commit(self) -> None:
        """What was allowed is spent."""
        for row, damage in self._pending.items():
            self.spent[row] = self.spent.get(row, 0.0) + damage
        self._pending = {}

    def cancel(self) -> None:
        """What was allowed to a call that failed is not spent."""
        self._pending = {}
