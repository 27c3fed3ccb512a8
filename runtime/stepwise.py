"""The stepwise driver: the host keeps its own loop, and rows that may skip are not evaluated.

The host's loop is the usual one: call the model, combine the guidance branches, let the scheduler
step.  The driver stands at two places of it, and at a third where a model has an assistant:

    hints = driver.assist(assistant, args, kwargs)   where a ControlNet was called
    output = driver.predict(model, args, kwargs)     where the model was called
    driver.observe(x, x_next, output)                right after the scheduler's step

A *row* is one latent of the scheduler's batch.  The model's batch holds one or several copies of
every row (guidance branches), ``[branch 0: all rows; branch 1: all rows; ...]``, in one call or in
several.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sidestep.runtime import ranges
from sidestep.runtime.calls import Arguments, Call
from sidestep.runtime.exits.leaving import Leaving
from sidestep.runtime.generation import MAX_CALLS, Generation
from sidestep.runtime.held import HeldOutput
from sidestep.runtime.methods.criterion import Course, Criterion, Decision, Observation
from sidestep.runtime.rows import by_row
from sidestep.runtime.summary import Summary

Model = Callable[..., Any]


class Stepwise:
    """Drives the model calls of a host's own sampling loop, one generation after another."""

    def __init__(
        self, criterion: Criterion, *, method: str = "", leaving: Leaving | None = None
    ) -> None:
        """Makes a driver.

        Args:
            criterion: Decides, after each step, which rows need the next one.
            method: What the summary calls the method.
            leaving: Decides, within each model call, which rows leave it early; None for none.
        """
        self.criterion = criterion
        self.method = method
        self.leaving = leaving
        self._generation = Generation()
        self._finished: Generation | None = None
        self._sizes: dict[Hashable, set[int]] = {}  # batches a host gave to a compiled model

    def begin(self, course: Course | None = None) -> None:
        """A generation begins: nothing of the one before is used again, whatever its end was.

        Args:
            course: What is known of it; its rows are counted here.
        """
        self.release()
        self._generation.begun = True
        self._generation.course = course or Course()
        if self.leaving is not None:
            self._generation.blocks = self.leaving.exits.blocks
            self.leaving.begin(self._generation.course)

    @property
    def stepped(self) -> bool:
        """Whether the generation has seen a step: `plan` comes too late then."""
        return self._generation.rows > 0

    @property
    def called(self) -> bool:
        """Whether the model was called since the last step."""
        return self._generation.called > 0

    @property
    def unplanned(self) -> bool:
        """Whether rows may leave the coming model call early if `plan` comes before it."""
        generation = self._generation
        new = not generation.steps and not generation.called
        return self.leaving is not None and new and generation.course.steps is None

    def plan(self, course: Course) -> None:
        """Says what `begin` does, for a host that knows only when it takes its first step."""
        planned, self._generation.course = self._generation.course, course
        if self.leaving is not None and course != planned:
            self.leaving.plan(course)

    def release(self) -> None:
        """The generation is over: frees what is held, and keeps what the summary needs."""
        generation, self._generation = self._generation, Generation()
        generation.free()
        if generation.rows:  # what the criterion has kept is as large as the latents
            self.criterion.start(replace(generation.course, rows=0))
        if self.leaving is not None:
            self.leaving.release()
        if generation.happened:
            self._finished = generation

    def predict(
        self,
        model: Model,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        key: Hashable = None,
        compiled: bool = False,
    ) -> Any:
        """Stands for ``model(*args, **kwargs)``.

        Rows that compute are gathered from every batch-first tensor of the arguments, however
        nested; the result is scattered into the last output. Without a row that computes, the
        model is not called.

        Args:
            model: The model.
            args: Its arguments.
            kwargs: Its arguments by name.
            key: Tells models and guidance branches apart, where the host can.
            compiled: Whether every new batch size costs a compilation; the model then sees only
                sizes that the host itself has given it.

        Returns:
            What the model returns, the same structure for the whole batch. The tensors are the
            caller's: writing into them does not reach what is held.
        """
        generation = self._enter_step()
        arguments = Arguments(model, args, kwargs)
        if generation.called >= MAX_CALLS:
            generation.ticks += 1
            return arguments.evaluate()
        sample = arguments.sample
        call = generation.find_call(key, arguments.condition)
        compute = self._rows_to_compute(call, arguments)
        with self._letting_leave(arguments, compute):
            output = call.make(
                arguments,
                compute,
                step=len(generation.steps),
                history=self.criterion.history,
                sizes=self._sizes_of(key, sample) if compiled else None,
            )
        generation.called += 1
        generation.ticks += compute is None or bool(compute)
        if compute is not None:
            assert call.held is not None
            output = self._reuse(call.held, compute)
        generation.output = next(
            (leaf.shape for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None
        )
        return output

    def _letting_leave(
        self, arguments: Arguments, compute: list[int] | None
    ) -> AbstractContextManager[None]:
        """Around the evaluation of these rows of the model's batch, None for all of them."""
        generation, sample = self._generation, arguments.sample
        if self.leaving is None or sample is None or compute == []:
            return nullcontext()
        rows = generation.rows if generation.rows and len(sample) % generation.rows == 0 else 0
        places = list(range(len(sample))) if compute is None else compute
        return self.leaving.call(len(generation.steps), rows, places, arguments.kwargs)

    def assist(
        self,
        model: Model,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        key: Hashable = "assistant",
        compiled: bool = False,
    ) -> Any:
        """Stands for the call of a network that feeds the model's next one, such as a ControlNet.

        It is called for the rows that the model will be called for. The others get what they had
        last: nothing reads it, as they leave the model's batch.

        Args:
            model: The network.
            args: Its arguments.
            kwargs: Its arguments by name.
            key: Tells several of them apart.
            compiled: As in `predict`.
        """
        generation = self._enter_step()
        arguments = Arguments(model, args, kwargs)
        sample, rows = arguments.sample, generation.rows
        call = generation.assistants.setdefault(key, Call())
        compute = None
        if (
            generation.decision is not None
            and generation.calls
            and sample is not None
            and len(sample) % rows == 0
            and call.held is not None
            and call.held.fits(sample)
        ):
            needed = [self._will_compute(row) for row in range(rows)]
            compute = None if all(needed) else [i for i in range(len(sample)) if needed[i % rows]]
        output = call.make(
            arguments,
            compute,
            step=len(generation.steps),
            history=1,
            sizes=self._sizes_of(key, sample) if compiled else None,
        )
        return output if call.held is None or compute is None else call.held.reuse({})

    def _enter_step(self) -> Generation:
        """The generation, with the profiler's range around its current step begun."""
        generation = self._generation
        if generation.range is None:
            generation.range = ranges.start(f"step/{len(generation.steps)}")
        return generation

    def _will_compute(self, row: int) -> bool:
        """Whether the model's next call will be made for the row."""
        generation = self._generation
        assert generation.decision is not None
        held = [call.held for calls in generation.calls.values() for call in calls]
        return generation.decision.compute[row] or any(h and self._unable(h, row) for h in held)

    def _rows_to_compute(self, call: Call, arguments: Arguments) -> list[int] | None:
        """Rows of the model's batch to evaluate; None for all of them, with nothing reused."""
        generation = self._generation
        decision, rows, held = generation.decision, generation.rows, call.held
        sample = arguments.sample
        if decision is None or all(decision.compute):
            return None
        reason = ""
        if sample is None:
            reason = "no batch found"
        elif sample.requires_grad and torch.is_grad_enabled():
            reason = "gradient wanted"
        elif held is None:
            reason = "no output to reuse"
        elif not held.fits(sample) or len(sample) % rows:
            reason = "batch changed"
        elif call.steady and not call.is_for(arguments.condition):
            reason = "prompt changed"
        for row in range(rows):
            why = reason or (held and self._unable(held, row))
            if why and not decision.compute[row]:
                generation.forced[row] = why
        called = [decision.compute[row] or row in generation.forced for row in range(rows)]
        if all(called) or sample is None:
            return None
        return [i for i in range(len(sample)) if called[i % rows]]

    def _unable(self, held: HeldOutput, row: int) -> str:
        """Why the row cannot skip, were it decided so; empty if it can.

        What is held must be the outputs that the criterion has in mind: a call that the host
        leaves out at some steps, or a second model that takes over, has others or fewer.
        """
        generation = self._generation
        decision = generation.decision
        assert decision is not None
        count = len(_weights(decision, row))
        steps = generation.computed[row][:count]
        if len(steps) < count or not held.has(row, generation.rows, steps):
            return "no output to reuse"
        if decision.offset is not None and not held.adds(decision.offset):
            return "no place for the offset"
        return ""

    def _reuse(self, held: HeldOutput, compute: list[int]) -> Any:
        """The output of the whole batch: held for the rows that are not in ``compute``."""
        decision, rows = self._generation.decision, self._generation.rows
        assert decision is not None
        batch, fresh = len(held.places), set(compute)
        weights = {i: _weights(decision, i % rows) for i in range(batch) if i not in fresh}
        if decision.offset is None:
            weights = {i: of_row for i, of_row in weights.items() if tuple(of_row) != (1.0,)}
            return held.reuse(weights)
        return held.reuse(weights, torch.cat([decision.offset] * (batch // rows)))

    def _sizes_of(self, key: Hashable, sample: Tensor | None) -> set[int]:
        kind = None if sample is None else (sample.shape[1:], sample.dtype)
        return self._sizes.setdefault((key, kind), set())

    def observe(
        self,
        x: Tensor,  # [rows, ...]
        x_next: Tensor,  # [rows, ...]
        output: Tensor | None = None,  # [rows, ...]
        step_sizes: Tensor | None = None,  # [rows] fp32
        *,
        copies: int = 1,
    ) -> None:
        """The scheduler has stepped from ``x`` to ``x_next``: decides what the next step computes.

        Args:
            x: The latents before the step. Frames that the scheduler steps one by one are put
                together again (`by_row`).
            x_next: The latents after it.
            output: What it stepped with: the model's output, guidance combined.
            step_sizes: ``mean |x_next - x|`` of each row where the scheduler's kernel has formed
                it already.
            copies: Equal copies of every row in the scheduler's batch; the first one is looked at.
        """
        generation = self._generation
        if not generation.called:
            generation.unseen += 1
            return
        x, x_next = x.detach(), x_next.detach()  # decisions keep no graph alive
        output = None if output is None else output.detach()
        shape = generation.output
        x, x_next = by_row(x, shape, copies), by_row(x_next, shape, copies)
        output = None if output is None else by_row(output, shape, copies)
        if output is not None and output.shape != x.shape:
            output = None  # something else than a prediction: policies, probabilities of tokens
        if step_sizes is not None:  # of frames, each as large as the others, the mean
            step_sizes = step_sizes[: len(step_sizes) // copies].reshape(len(x), -1).mean(1)
        generation = self._with_rows(len(x))
        taken = generation.end_step(self.criterion.history)
        if self.leaving is not None:
            taken.layers = self.leaving.end_step(taken.compute)
        if len(generation.steps) == generation.course.steps:
            self.release()
            return
        seen = Observation(
            step=len(generation.steps) - 1,
            x=x,
            x_next=x_next,
            output=output,
            computed=taken.compute,
            step_sizes=step_sizes,
        )
        with ranges.within("decide"):
            generation.decision = self.criterion.observe(seen)

    def _with_rows(self, rows: int) -> Generation:
        """The generation; a new one where the scheduler's batch has changed midway."""
        generation = self._generation
        if generation.rows not in (0, rows):
            called, taken = generation.called, len(generation.steps)
            course, blocks = generation.course.after(taken), generation.blocks
            self.release()
            generation = self._generation = Generation(
                begun=True, course=course, called=called, ticks=called, blocks=blocks
            )
            if self.leaving is not None:
                self.leaving.rule.resume(course, taken)
        if not generation.rows:
            self.criterion.start(replace(generation.course, rows=rows))
            generation.rows = rows
            generation.computed = [[] for _ in range(rows)]
        return generation

    def summary(self) -> Summary:
        """The generation that runs, or the last one that ran."""
        generation = self._generation
        if not generation.happened and self._finished is not None:
            generation = self._finished
        return generation.summary(self.method)


def _weights(decision: Decision, row: int) -> Sequence[float]:
    """Weights of the row's computed outputs, newest first; at least one."""
    of_row = () if decision.weights is None else decision.weights[row]
    return of_row if len(of_row) else (1.0,)
