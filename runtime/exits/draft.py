"""Evaluations of which only a draft is made leave the model early; the others beside them do not.

Rows of one model call are at many steps here (SRDS), and each leaves where the static plan of its
own step says (`sidestep.runtime.exits.plan`). It depends on the step alone, and nothing is read
from the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sidestep.runtime.exits.file import Exits
from sidestep.runtime.exits.flight import Flight
from sidestep.runtime.exits.layouts import Layout
from sidestep.runtime.exits.leaving import Ways
from sidestep.runtime.exits.plan import translators_plan
from sidestep.runtime.methods.criterion import Course


class Drafting(Ways):
    """The exits of a trajectory's drafts.

    Attributes:
        drafted: Rows of the model that may have left early so far, guidance branches apart.
        run: Blocks that they have passed.
    """

    def __init__(self, exits: Exits, layout: Layout, threshold: float) -> None:
        """No trajectory runs yet."""
        super().__init__(exits, layout)
        self._threshold = threshold
        self.begin(Course())

    def begin(self, course: Course) -> None:
        """A trajectory begins; where its lambda is not known, nobody leaves."""
        self.passage, self.drafted, self.run = None, 0, 0
        plan = translators_plan(self.exits, course, self._threshold)
        depths = (*self.exits.after, self.exits.blocks)
        self._depths = () if plan is None else tuple(depths[exit] for exit in plan.exits)

    @contextmanager
    def call(self, drafts: Sequence[int | None], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Around one call of the model.

        Args:
            drafts: ``[n]`` by row its step, None where it is to pass all blocks.
            kwargs: Arguments of the call.
        """
        blocks, known = self.exits.blocks, len(self._depths)
        free = not self.layout.keeps_together(kwargs)
        self._ends = [
            self._depths[k] if k is not None and k < known and free else blocks for k in drafts
        ]
        if min(self._ends, default=blocks) < blocks:
            self.passage = Flight(len(drafts), blocks, self)
        try:
            yield
        finally:
            self.passage = None
        early = [end for k, end in zip(drafts, self._ends, strict=True) if k is not None]
        self.drafted += len(early)
        self.run += sum(early)

    def leave(self, index: int, hidden: Tensor, places: Sequence[int]) -> Sequence[bool] | None:
        """Rows whose depth it is."""
        leaves = [self._ends[place] == index + 1 for place in places]
        return leaves if any(leaves) else None

    @property
    def note(self) -> str:
        """What has come of it."""
        if not self.drafted:
            return "no evaluation was a draft"
        share = self.run / (self.drafted * self.exits.blocks)
        depth = self.run / self.drafted
        return (
            f"{self.drafted} evaluations were drafts (guidance branches apart), with "
            f"{depth:.1f} of {self.exits.blocks} blocks ({share:.0%})"
        )
