"""The static plan: at each step all rows do the same. Nothing is read from the device.

    minimise sum_k depth_k    subject to    sum_k W_k e_k <= E

over leaving at an exit, with a translator or with the rest of earlier calls, and not calling the
model at all (`sidestep.runtime.exits.menu`), E being the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

from sidestep.runtime.exits.file import Exits
from sidestep.runtime.exits.leaving import Rule, Sight
from sidestep.runtime.exits.menu import menu_plan
from sidestep.runtime.exits.plan import NOT_CALLED, StaticPlan, translators_plan
from sidestep.runtime.exits.rests import Rests, slope
from sidestep.runtime.methods.criterion import Course, Decision, Observation


class Static(Rule):
    """One choice for each step."""

    KIND = "excess"
    THRESHOLD = 0.12

    def __init__(
        self, exits: Exits, threshold: float, *, reuse: object = None, **_others: object
    ) -> None:
        """Plans nothing yet.

        Args:
            exits: Of the model.
            threshold: E.
            reuse: None where the plan may leave out calls, False where it may not. Where another
                method does, the calls to continue are not those that the plan counts on: rows
                leave with translators then.
        """
        self._exits = exits
        self._budget = threshold
        self._reuse = reuse
        self.start(Course())

    def start(self, course: Course) -> None:
        """Plans the trajectory; without its lambda nobody leaves."""
        self._plan_for(course, self._budget)

    def _plan_for(self, course: Course, budget: float) -> None:
        """A plan, in which calls are continued unless noise has come between them."""
        self.plan: StaticPlan | None = None
        self.rests: Rests | None = None
        self.log_snr = course.log_snr or ()
        if self._reuse or course.noise:
            self.plan = translators_plan(self._exits, course, budget)
            return
        self.plan = menu_plan(self._exits, course, budget, reuse=self._reuse is None)
        if self.plan is not None:
            self.rests = Rests(self.plan, self.log_snr, len(self._exits.after))

    def resume(self, course: Course, steps: int) -> None:
        """Another plan, of what is left: there are no calls of these rows to continue."""
        spent = 0.0 if self.plan is None else sum(self.plan.damages[:steps])
        self._plan_for(course, self._budget - spent)

    def leave(self, sight: Sight) -> Sequence[bool] | None:
        """All rows at the step's exit, and none elsewhere."""
        plan, k = self.plan, sight.step
        if plan is None or k >= len(plan.exits) or plan.exits[k] != sight.exit:
            return None
        return [True] * len(sight.hidden)


class LeftOut:
    """The steps at which the plan does not call the model: its last two outputs are continued."""

    history = 2

    def __init__(self, rule: Static) -> None:
        """Takes who has the plan."""
        self._rule = rule

    def start(self, course: Course) -> None:
        """No step has been seen."""
        self._called: list[list[int]] = [[] for _ in range(course.rows)]  # by row, newest first

    def observe(self, seen: Observation) -> Decision:
        """As planned; a step that had to be computed in spite of it counts as one that was."""
        rows, plan, snr, k = len(seen.computed), self._rule.plan, self._rule.log_snr, seen.step + 1
        for row, computed in enumerate(seen.computed):
            if computed:
                self._called[row] = [seen.step, *self._called[row][:1]]
        left_out = plan is not None and k < len(plan.exits) and plan.exits[k] == NOT_CALLED
        if not left_out or min(map(len, self._called)) < 2:
            return Decision(compute=[True] * rows, reasons=["planned"] * rows)
        slopes = [slope(snr, k, *called) for called in self._called]
        return Decision(
            compute=[False] * rows,
            reasons=["skipped"] * rows,
            weights=[(1 + w, -w) for w in slopes],
        )
