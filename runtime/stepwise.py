"""The stepwise driver: the host keeps its own loop, and rows that may skip are not evaluated.

The host's loop is the usual one: call the model, combine the guidance branches, let the scheduler
step.  The driver stands at two places of it:

    output = driver.predict(model, args, kwargs)     where the model was called
    driver.observe(x, x_next)                        right after the scheduler's step

A *row* is one latent of the scheduler's batch.  The model's batch holds one or several copies of
every row (guidance branches), ``[branch 0: all rows; branch 1: all rows; ...]``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sidestep.runtime.methods.criterion import Criterion, Decision
from sidestep.runtime.rows import HeldOutput, find_sample, take_rows
from sidestep.runtime.summary import Summary

_MAX_CALLS = 4
"""Calls within one step whose outputs are held: separate calls for every guidance branch. More than
that is a host that calls the model without a scheduler, and nothing is kept for it."""


@dataclass
class _Step:
    """What happened at one step."""

    compute: list[bool]  # [rows]
    reasons: list[str]  # [rows]
    value: Tensor | None  # [rows]


@dataclass
class _Generation:
    """All state of one generation; a new one is made whenever a generation begins."""

    planned: int | None = None
    rows: int = 0  # of the scheduler's batch; known once it has stepped
    decision: Decision | None = None  # for the step to come; None before the first
    held: list[HeldOutput | None] = field(default_factory=list)  # by call within a step
    calls: int = 0  # model calls the host has made in the current step
    forced: str = ""  # why rows that could have skipped were computed in the current step
    ticks: int = 0  # calls that reached the model
    unseen: int = 0  # scheduler steps without a model call in between
    steps: list[_Step] = field(default_factory=list)


class Stepwise:
    """Drives the model calls of a host's own sampling loop, one generation after another."""

    def __init__(self, criterion: Criterion, *, method: str = "") -> None:
        """Makes a driver.

        Args:
            criterion: Decides, after each step, which rows need the next one.
            method: What the summary calls the method.
        """
        self.criterion = criterion
        self.method = method
        self._generation = _Generation()
        self._finished: _Generation | None = None

    def begin(self, steps: int | None = None) -> None:
        """A generation begins: nothing of the one before is used again, whatever its end was.

        Args:
            steps: Scheduler steps planned, if known.
        """
        self.release()
        self._generation = _Generation(planned=steps)

    def release(self) -> None:
        """The generation is over: frees what is held, and keeps what the summary needs."""
        if self._generation.steps:
            self._finished = self._generation
        self._generation.held.clear()
        self._generation = _Generation()

    def predict(
        self, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Stands for ``model(*args, **kwargs)``.

        Rows that compute are gathered from every batch-first tensor of the arguments, however
        nested; the result is scattered into the last output. Without a row that computes, the
        model is not called.

        Returns:
            What the model returns, the same structure for the whole batch. The tensors are the
            caller's: writing into them does not reach what is held.
        """
        generation = self._generation
        if generation.calls >= _MAX_CALLS:
            generation.ticks += 1
            return model(*args, **kwargs)
        if generation.calls == len(generation.held):
            generation.held.append(None)
        held = generation.held[generation.calls]
        sample = find_sample(args, kwargs)
        compute = self._rows_to_compute(held, sample)
        if compute is None:
            output = model(*args, **kwargs)
            generation.held[generation.calls] = HeldOutput.of(sample, output)
        else:
            assert held is not None and sample is not None
            if compute:
                index = torch.tensor(compute, device=sample.device)
                part = model(
                    *take_rows(tuple(args), index, len(sample)),
                    **take_rows(dict(kwargs), index, len(sample)),
                )
                held.put(part, index)
            output = held.copy()
        generation.calls += 1  # not before the model has succeeded: the host may try again
        generation.ticks += compute is None or bool(compute)
        return output

    def _rows_to_compute(self, held: HeldOutput | None, sample: Tensor | None) -> list[int] | None:
        """Rows of the model's batch to evaluate; None for all of them, with nothing reused."""
        generation = self._generation
        decision = generation.decision
        if decision is None or all(decision.compute):
            return None
        if sample is None or held is None:
            generation.forced = "no output to reuse"
        elif not held.fits(sample) or len(sample) % generation.rows:
            generation.forced = "batch changed"
        else:
            chosen = decision.compute
            return [i for i in range(len(sample)) if chosen[i % generation.rows]]
        return None

    def observe(
        self,
        x: Tensor,  # [rows, ...]
        x_next: Tensor,  # [rows, ...]
        delta: Tensor | None = None,  # [rows] fp32
    ) -> None:
        """The scheduler has stepped from ``x`` to ``x_next``: decides what the next step computes.

        Args:
            x: The latents before the step.
            x_next: The latents after it.
            delta: ``mean |x_next - x|`` of each row where the scheduler's kernel has formed it
                already.
        """
        generation = self._generation
        rows = len(x_next)
        if not generation.calls:
            generation.unseen += 1
            return
        if generation.rows not in (0, rows):
            calls = generation.calls
            self.begin()
            generation = self._generation
            generation.calls = generation.ticks = calls
        if not generation.rows:
            generation.rows = rows
            self.criterion.start(rows, generation.planned)
        step = len(generation.steps)
        generation.steps.append(_record(generation, rows))
        if step + 1 == generation.planned:
            self.release()
            return
        delta = step_sizes(x, x_next) if delta is None else delta.clone()  # a kernel's own buffer
        generation.decision = self.criterion.observe(step, delta)
        generation.calls = 0
        generation.forced = ""

    def summary(self) -> Summary:
        """The generation that runs, or the last one that ran."""
        generation = self._generation
        if not generation.steps and self._finished is not None:
            generation = self._finished
        steps, rows = generation.steps, range(generation.rows)
        nothing = torch.full((generation.rows,), float("nan"))
        values = [nothing if s.value is None else s.value.float().cpu() for s in steps]
        criterion = torch.stack(values, dim=1).tolist() if values else []
        skip_map = tuple(tuple(s.compute[row] for s in steps) for row in rows)
        reasons = tuple(tuple(s.reasons[row] for s in steps) for row in rows)
        return Summary(
            method=self.method,
            nfe=tuple(float(sum(called)) for called in skip_map),
            ticks=generation.ticks,
            steps=len(steps),
            skip_map=skip_map,
            reasons=reasons,
            criterion=tuple(tuple(row) for row in criterion),
            note=_note(generation, reasons),
        )


def step_sizes(
    x: Tensor,  # [rows, ...]
    x_next: Tensor,  # [rows, ...]
) -> Tensor:
    """``delta = mean |x_next - x|`` of each row, ``[rows]`` fp32."""
    return (x_next.float() - x.float()).abs().flatten(1).mean(1)


def _record(generation: _Generation, rows: int) -> _Step:
    """The step that was just taken, as it was decided and as it really went."""
    decision = generation.decision
    if decision is None:
        return _Step([True] * rows, ["warm-up"] * rows, None)
    if not generation.forced:
        return _Step(decision.compute, decision.reasons, decision.value)
    reasons = [
        reason if compute else generation.forced
        for compute, reason in zip(decision.compute, decision.reasons, strict=True)
    ]
    return _Step([True] * rows, reasons, decision.value)


def _note(generation: _Generation, reasons: tuple[tuple[str, ...], ...]) -> str:
    """Says so where nothing was skipped, and why; empty otherwise."""
    if generation.unseen and not generation.steps:
        return (
            f"nothing was skipped: the scheduler stepped {generation.unseen} times without a call "
            "of the model that was enabled"
        )
    if not generation.steps:
        return "no generation has run yet"
    counts = Counter(reason for row in reasons for reason in row)
    if counts["skipped"]:
        return ""
    why = ", ".join(f"{count} by {reason}" for reason, count in counts.most_common())
    values = [s.value for s in generation.steps if s.value is not None]
    lowest = f"; smallest criterion {torch.stack(values).min().item():.3g}" if values else ""
    return f"nothing was skipped: of {sum(counts.values())} calls {why}{lowest}"
