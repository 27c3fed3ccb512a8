"""Early exit along a generation: one `Flight` a model call, and what all of them know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from sidestep.runtime.exits.file import Exits
from sidestep.runtime.exits.flight import Flight, Passage
from sidestep.runtime.exits.layouts import Layout
from sidestep.runtime.exits.modules import Parts, Translators
from sidestep.runtime.exits.rests import Rests
from sidestep.runtime.methods.criterion import Course

_Some = TypeVar("_Some", bound=Parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sight:
    """Rows of a model call that have come to an exit.

    Attributes:
        step: Of the trajectory.
        exit: Number of the exit.
        hidden: ``[n, tokens, width]``.
        rows: ``[n]`` which row of the scheduler's batch each is a branch of; None in the first
            step, in which nobody knows.
    """

    step: int
    exit: int
    hidden: Tensor
    rows: Sequence[int] | None

    @cached_property
    def pairs(self) -> tuple[int, list[int]] | None:
        """Guidance branches, and the rows of each: ``[branch 0: all rows; branch 1: ...]``.

        None where the rows are not known, or not all of them have as many branches.
        """
        if self.rows is None:
            return None
        rows = list(dict.fromkeys(self.rows))
        branches = len(self.rows) // len(rows)
        return (branches, rows) if list(self.rows) == rows * branches else None


class Rule(ABC):
    """Who leaves where: one method of early exit. What is not abstract is for those that need it.

    Attributes:
        joint: Whether all branches of a row leave together; a second model call of a step then
            follows the first one.
        rests: What it goes on with in place of translators; None for nothing.
    """

    joint: bool = True
    rests: Rests | None = None

    @abstractmethod
    def start(self, course: Course) -> None:
        """A trajectory begins, or more is known of it before its second step."""

    def resume(self, course: Course, steps: int) -> None:
        """The rows are others from here on, nobody knows which.

        Args:
            course: What is left of the trajectory.
            steps: That were taken before.
        """
        self.start(course)

    @abstractmethod
    def leave(self, sight: Sight) -> Sequence[bool] | None:  # [n]
        """Which rows leave; None for none. What it costs them counts from `commit` on."""

    def commit(self) -> None:  # noqa: B027, nothing is kept
        """The model call has succeeded."""

    def cancel(self) -> None:  # noqa: B027
        """A model call begins: what was not committed has not happened."""


class Ways:
    """The ways out of a model.

    Attributes:
        exits: Of the model.
        layout: Of the model.
        passage: What every block's call goes through now; None outside a model call.
    """

    def __init__(self, exits: Exits, layout: Layout) -> None:
        """Outside of a model call."""
        self.exits = exits
        self.layout = layout
        self.passage: Passage | None = None
        self._number = {blocks - 1: i for i, blocks in enumerate(exits.after)}  # by block
        self._translators: Translators | None = None

    def translate(self, index: int, hidden: Tensor) -> Tensor:
        """h' of rows that leave after block ``index``."""
        if self.exits.translators is None:
            return hidden
        own = self._translators
        if own is None or own.matrix.device != hidden.device or own.matrix.dtype != hidden.dtype:
            own = self._translators = self.exits.translators.to(hidden.device, hidden.dtype)
        return own(self._number[index], hidden)

    def land(self, hidden: Tensor) -> None:
        """Nobody has left the call."""


class Leaving(Ways):
    """What the blocks of the model ask, and what the driver tells.

    Attributes:
        rule: Who leaves where.
    """

    def __init__(self, exits: Exits, layout: Layout, rule: Rule) -> None:
        """No generation runs yet."""
        super().__init__(exits, layout)
        self.rule = rule
        self.begin(Course())

    def begin(self, course: Course) -> None:
        """A generation begins."""
        self.passage = None
        self._depths: list[tuple[int, int]] = []  # place in the host's batch, blocks passed
        self._decided: dict[int, int] = {}  # row: blocks that its first branch has passed
        self._calls = 0  # of this step
        self.rule.start(course)

    def plan(self, course: Course) -> None:
        """More is known of the generation, before its second step."""
        self.rule.start(course)

    def release(self) -> None:
        """The generation is over: frees what is as large as hidden states."""
        if self.rule.rests is not None:
            self.rule.rests.forget()

    @contextmanager
    def call(
        self, step: int, rows: int, places: Sequence[int], kwargs: Mapping[str, Any]
    ) -> Iterator[None]:
        """Around one call of the model. What was decided in it counts if it succeeds.

        Args:
            step: Of the trajectory.
            rows: Rows of the scheduler's batch, 0 in the first step.
            places: Of the rows of the call in the host's whole batch.
            kwargs: The host's arguments.
        """
        if self.layout.keeps_together(kwargs):
            yield
            self._depths += [(place, self.exits.blocks) for place in places]
            return
        self._step, self._rows = step, [place % rows for place in places] if rows else None
        self.rule.cancel()
        if self.rule.rests is not None:
            self.rule.rests.open(step, self._calls, places)
        self._calls += 1
        flight = Flight(len(places), self.exits.blocks, self)
        self.passage = flight
        try:
            yield
        finally:
            self.passage = None
        self.rule.commit()
        self._depths += zip(places, flight.depths, strict=True)
        if self._rows is not None:
            for row, depth in zip(self._rows, flight.depths, strict=True):
                self._decided.setdefault(row, depth)

    def leave(self, index: int, hidden: Tensor, places: Sequence[int]) -> Sequence[bool] | None:
        """Which rows leave after block ``index``: as in the step's first call, or by the rule."""
        exit = self._number.get(index)
        if exit is None:
            return None
        rests = self.rule.rests
        if rests is not None:
            rests.see(exit, hidden)
            if rests.due and not rests.ready:
                return None
        rows = None if self._rows is None else [self._rows[place] for place in places]
        if self.rule.joint and rows is not None and any(row in self._decided for row in rows):
            return [self._decided.get(row) == index + 1 for row in rows]
        return self.rule.leave(Sight(step=self._step, exit=exit, hidden=hidden, rows=rows))

    def translate(self, index: int, hidden: Tensor) -> Tensor:
        """h' of rows that leave after block ``index``: by their rest where that is planned."""
        rests = self.rule.rests
        if rests is not None and rests.due:
            return rests.add(self._number[index], hidden)
        return super().translate(index, hidden)

    def land(self, hidden: Tensor) -> None:
        """Nobody has left the call."""
        if self.rule.rests is not None:
            self.rule.rests.land(hidden)

    def end_step(self, computed: Sequence[bool]) -> list[float]:  # [rows]
        """The step is over: how many blocks each row has passed, in the mean over its branches.

        Args:
            computed: ``[rows]``, whether the model was called for the row.
        """
        depths: list[list[int]] = [[] for _ in computed]
        for place, depth in self._depths:
            depths[place % len(computed)].append(depth)
        self._depths, self._decided, self._calls = [], {}, 0
        whole = [self.exits.blocks * was for was in computed]
        return [
            sum(of_row) / len(of_row) if of_row else float(blocks)
            for of_row, blocks in zip(depths, whole, strict=True)
        ]


def on(device: torch.device, parts: _Some) -> _Some:
    """The parts on that device."""
    first = next(iter(parts.tensors().values()))
    return parts if first.device == device else parts.to(device)
