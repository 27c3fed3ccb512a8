"""A criterion that does what it is told, and remembers what it was shown."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sidestep.runtime.methods.criterion import Course, Decision, Observation


class Script:
    """One string a step, with '#' for a row that computes and '.' for one that skips.

    Args:
        marks: From the first step on; every row computes beyond them. The first step always does.
        weights: By step.
        offsets: By step.
        history: Outputs to keep of each row.
        shows_value: Whether it gives the step sizes as the number that decided.
    """

    def __init__(
        self,
        marks: Sequence[str],
        weights: dict[int, Any] | None = None,
        offsets: dict[int, Tensor] | None = None,
        history: int = 3,
        shows_value: bool = False,
    ) -> None:
        self.marks, self.history, self.shows_value = marks, history, shows_value
        self.weights, self.offsets = weights or {}, offsets or {}
        self.seen: list[Observation] = []

    def start(self, course: Course) -> None:
        self.course = course

    def observe(self, seen: Observation) -> Decision:
        self.seen.append(seen)
        k = seen.step + 1
        marks = self.marks[k] if k < len(self.marks) else "#" * self.course.rows
        return Decision(
            compute=[mark == "#" for mark in marks],
            reasons=["criterion" if mark == "#" else "skipped" for mark in marks],
            value=seen.delta if self.shows_value else None,
            weights=self.weights.get(k),
            offset=self.offsets.get(k),
        )
