"""Leaving early and not calling the model at all, paid from one budget.

A skipped step is an exit before the first block. What it does to the finished picture is what the
criterion of `Adaptive` foretells, v, added up over a run of skips (`gate`): a run as a whole costs
the v of its last step, and each step of it the increase. The row's ledger (`rules.sample`) pays
for it or the model is called.
"""

from __future__ import annotations

from dataclasses import replace

from sidestep.runtime.exits.rules.sample import PerSample
from sidestep.runtime.methods.criteria.carried_error import share_of
from sidestep.runtime.methods.criterion import Course, Criterion, Decision, Observation


class OneBudget:
    """A criterion whose skips the ledger has to allow."""

    def __init__(self, criterion: Criterion, ledger: PerSample) -> None:
        """Takes the criterion that proposes, and the ledger that pays."""
        self.history = criterion.history
        self._criterion, self._ledger = criterion, ledger
        self._paid: list[float] = []  # by row, of its present run of skips

    def start(self, course: Course) -> None:
        """A trajectory begins; the ledger is told by `Leaving`."""
        self._criterion.start(course)
        self._paid = [0.0] * course.rows
        self._share = share_of(course.steps or 50)

    def observe(self, seen: Observation) -> Decision:
        """What the criterion proposes, as far as it can be paid."""
        decision = self._criterion.observe(seen)
        compute, reasons = list(decision.compute), list(decision.reasons)
        for row, computed in enumerate(seen.computed):
            if computed:  # also where a skip that was paid for could not be made
                self._paid[row] = 0.0
        values = [] if decision.value is None else (decision.value / self._share).tolist()
        for row, value in enumerate(values):
            if not compute[row]:
                more = max(value - self._paid[row], 0.0)
                if self._ledger.pay(row, seen.step + 1, more):
                    self._paid[row] += more
                    continue
                compute[row], reasons[row] = True, "budget"
            self._paid[row] = 0.0
        return replace(decision, compute=compute, reasons=reasons)
