"""What the stepwise driver knows of one generation, and the summary of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sidestep.runtime import ranges
from sidestep.runtime.calls import Call
from sidestep.runtime.methods.criterion import Course, Decision
from sidestep.runtime.summary import Summary, nothing_skipped

MAX_CALLS = 8
"""Calls within one step whose outputs are held: separate calls for every guidance branch. More than
that is a host that calls the model without a scheduler, and nothing is kept for it."""


@dataclass
class Step:
    """What happened at one step."""

    compute: list[bool]  # [rows]
    reasons: list[str]  # [rows]
    value: Tensor | None  # [rows]
    layers: list[float] = field(default_factory=list)  # [rows] where rows may leave early


@dataclass
class Generation:
    """All state of one generation; a new one is made whenever a generation begins."""

    begun: bool = False
    course: Course = field(default_factory=Course)
    rows: int = 0  # of the scheduler's batch; known once it has stepped
    decision: Decision | None = None  # for the step to come; None before the first
    calls: dict[Hashable, list[Call]] = field(default_factory=dict)  # by model and branch
    assistants: dict[Hashable, Call] = field(default_factory=dict)
    output: torch.Size | None = None  # shape of what the model returned last
    computed: list[list[int]] = field(default_factory=list)  # by row, its last steps, newest first
    called: int = 0  # model calls the host has made in the current step
    forced: dict[int, str] = field(default_factory=dict)  # rows that were to skip and could not
    ticks: int = 0  # calls that reached the model
    unseen: int = 0  # scheduler steps without a model call in between
    steps: list[Step] = field(default_factory=list)
    range: Any = None  # of the profiler, around the current step
    blocks: int = 0  # of the model, where rows may leave it early

    @property
    def happened(self) -> bool:
        """Whether there is anything to tell of it, if only that parts of it were missing.

        A few calls after the last step of another generation are no generation.
        """
        return bool(self.steps) or self.ticks + self.unseen > (0 if self.begun else MAX_CALLS)

    def free(self) -> None:
        """Lets go of everything as large as the latents; the summary needs none of it."""
        self.calls.clear()
        self.assistants.clear()
        self.decision = None
        ranges.end(self.range)
        self.range = None

    def find_call(self, key: Hashable, condition: tuple[Tensor, int] | None) -> Call:
        """The call that the host is making: by its embedding, or by its turn within the step."""
        calls = self.calls.setdefault(key, [])
        left = [call for call in calls if not call.made]
        for call in left:
            if call.is_for(condition):
                return call
        if not left:
            left = [Call()]
            calls += left
        return left[0]

    def end_step(self, history: int) -> Step:
        """The step that was just taken, as it was decided and as it really went.

        Args:
            history: Computed steps of each row to remember.
        """
        taken = self._taken()
        for row, computed in enumerate(taken.compute):
            if computed:
                self.computed[row] = [len(self.steps), *self.computed[row][: history - 1]]
        self.steps.append(taken)
        for calls in self.calls.values():
            for call in calls:
                call.made = False
        self.called = 0
        self.forced = {}
        ranges.end(self.range)
        self.range = None
        return taken

    def _taken(self) -> Step:
        decision, forced = self.decision, self.forced
        if decision is None:
            return Step([True] * self.rows, ["warm-up"] * self.rows, None)
        compute = [called or row in forced for row, called in enumerate(decision.compute)]
        reasons = [forced.get(row, reason) for row, reason in enumerate(decision.reasons)]
        return Step(compute, reasons, decision.value)

    def summary(self, method: str) -> Summary:
        """The numbers, image by image."""
        steps, rows = self.steps, range(self.rows)
        nothing = torch.full((self.rows,), float("nan"), device="cpu")
        values = [nothing if s.value is None else s.value.float().cpu() for s in steps]
        criterion = torch.stack(values, dim=1).tolist() if values else []
        skip_map = tuple(tuple(s.compute[row] for s in steps) for row in rows)
        reasons = tuple(tuple(s.reasons[row] for s in steps) for row in rows)
        return Summary(
            method=method,
            nfe=tuple(float(sum(called)) for called in skip_map),
            ticks=self.ticks,
            steps=len(steps),
            skip_map=skip_map,
            reasons=reasons,
            criterion=tuple(tuple(row) for row in criterion),
            layers=tuple(tuple(s.layers[row] for s in steps) for row in rows if self.blocks),
            blocks=self.blocks,
            note=self._note(reasons, criterion),
        )

    def _note(
        self, reasons: tuple[tuple[str, ...], ...], criterion: Sequence[Sequence[float]]
    ) -> str:
        """Says so where nothing was skipped, and why; empty otherwise."""
        if not self.steps and self.unseen:
            return (
                f"nothing was skipped: the scheduler stepped {self.unseen} times without a call "
                "of the model that was enabled"
            )
        if not self.steps and self.ticks:
            return (
                f"nothing was skipped: the model was called {self.ticks} times without a step of "
                "the scheduler that was enabled"
            )
        if not self.steps:
            return "no generation has run yet"
        if self.blocks and all(min(step.layers) == self.blocks for step in self.steps):
            why = "" if self.course.advances else ": the scheduler does not say how log-SNR rises"
            return f"no row left early{why}"
        if self.blocks or any("skipped" in row for row in reasons):
            return ""
        return nothing_skipped(reasons, criterion)
