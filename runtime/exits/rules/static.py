"""The static plan: at each step all rows leave at the same exit. Nothing is read from the device.

    minimise sum_k depth_k    subject to    sum_k W_k e_{i_k, k} <= E

(`sidestep.runtime.exits.plan`), E being the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

from sidestep.runtime.exits.file import Exits
from sidestep.runtime.exits.leaving import Sight
from sidestep.runtime.exits.plan import StaticPlan, static_plan
from sidestep.runtime.methods.criterion import Course


class Static:
    """One exit for each step."""

    KIND = "excess"
    THRESHOLD = 0.05

    joint = True

    def __init__(self, exits: Exits, threshold: float, **_others: bool) -> None:
        """Plans nothing yet."""
        self._exits = exits
        self._budget = threshold
        self._plan: StaticPlan | None = None

    def start(self, course: Course) -> None:
        """Plans the trajectory; without its lambda nobody leaves."""
        self._plan = static_plan(self._exits, course, self._budget)

    def leave(self, sight: Sight) -> Sequence[bool] | None:
        """All rows at the step's exit, and none elsewhere."""
        if self._plan is None or sight.step >= len(self._plan.exits):
            return None
        if self._plan.exits[sight.step] != sight.exit:
            return None
        return [True] * len(sight.hidden)

    def commit(self) -> None:
        """Nothing is kept."""

    def cancel(self) -> None:
        """Nothing is kept."""
