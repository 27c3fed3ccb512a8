"""Runs a pipeline whose model is looked into: hidden states at exits, and rows sent through them.

The pipeline keeps its own loop. At every step the model runs in full, for the output y that is
learned from; what the pipeline goes on with may be the output of an exit, row by row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from sidestep.adapters.attach import BlockPart, block_overrides, blocks_of
from sidestep.adapters.attach_course import course_of
from sidestep.adapters.guidance import fit_weights
from sidestep.adapters.swap import restore, swap
from sidestep.errors import UserError
from sidestep.runtime.exits.flight import Passage
from sidestep.runtime.exits.layouts import HIDDEN, Blocks, layout_of
from sidestep.runtime.methods.criterion import Course

Choose = Callable[[int], Sequence[int | None]]
"""``choose(step)``: the exit of each row, None for the whole model."""
Translate = Callable[[int, Tensor], Tensor]
"""``translate(exit, h)``: what the head reads of hidden states at an exit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One model call of a trajectory, and what it gave.

    Attributes:
        step: Of the trajectory.
        args: Of the model.
        kwargs: Of the model.
        hidden: K of ``[branches * rows, tokens, width]``, after each exit's block, in half
            precision if the recorder was told so.
        output: ``[branches * rows, channels, ...]`` of the whole model.
        weights: Of the branches, in the prediction that the scheduler steps with.
        channels: How many of the output's are that prediction.
        chosen: ``[rows]`` the exits that the trajectory went on with.
    """

    step: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden: Sequence[Tensor]
    output: Tensor
    weights: Sequence[float]
    channels: int
    chosen: Sequence[int | None]

    @property
    def rows(self) -> int:
        """Pictures."""
        return len(self.output) // len(self.weights)

    def guided_error(self, output: Tensor) -> Tensor:  # [branches * rows, ...] -> [rows]
        """e^2: the mean square of ``sum_g w_g (output_g - y_g)``, over all but the rows."""
        wrong = (output.float() - self.output.float())[:, : self.channels]
        branches = wrong.unflatten(0, (len(self.weights), self.rows))
        guided = sum(w * b for w, b in zip(self.weights, branches, strict=True))
        assert isinstance(guided, Tensor)
        return guided.square().flatten(1).mean(1)


class Watch:
    """Notes the hidden states after some blocks."""

    def __init__(self, after: Sequence[int]) -> None:
        """Takes the blocks passed at each exit."""
        self._after = after
        self.hidden: list[Tensor] = []

    def through(
        self,
        index: int,
        blocks: Blocks,
        block: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Runs the block."""
        output = block(*args, **kwargs)
        if index + 1 in self._after:
            hidden = blocks.streams(output)[HIDDEN]
            assert hidden is not None
            self.hidden.append(hidden)
        return output


class Substitute:
    """Runs no block: the head reads the hidden states that are given."""

    def __init__(self, hidden: Tensor, depth: int) -> None:
        """Takes them, and the number of blocks."""
        self._hidden, self._last = hidden, depth - 1

    def through(
        self,
        index: int,
        blocks: Blocks,
        block: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Hands on what came, and at last the hidden states."""
        given = blocks.named(args, kwargs)
        return blocks.output({**given, HIDDEN: self._hidden} if index == self._last else given)


class Looking:
    """A transformer with an open passage through its blocks, within a ``with`` statement."""

    def __init__(self, model: Any) -> None:
        """Prepares.

        Raises:
            UserError: Rows cannot leave a model of this class.
        """
        self.model = model
        self.passage: Passage | None = None
        try:
            self.blocks = blocks_of(model, layout_of(model))
        except ValueError as error:
            raise UserError(str(error)) from error
        self.call = functools.partial(type(model).__call__, model)

    def __enter__(self) -> Looking:
        for part, block in self.blocks:
            assert isinstance(part, BlockPart)
            swap(block, self, block_overrides(self, part, type(block)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for _, block in self.blocks:
            restore(block)

    def watch(
        self, after: Sequence[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, list[Tensor]]:
        """The output of the whole model, and the hidden states at the exits."""
        watch = Watch(after)
        return self._with(watch, args, kwargs), watch.hidden

    def head(self, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The model's own head on hidden states, in the call that they are of."""
        output = self._with(Substitute(hidden, len(self.blocks)), args, kwargs)
        return output_tensor(output)

    def _with(self, passage: Passage, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.passage = passage
        try:
            return self.call(*args, **kwargs)
        finally:
            self.passage = None


def output_tensor(output: Any) -> Tensor:
    """The one tensor that a transformer returns."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    assert len(tensors) == 1
    return tensors[0]


class Recorder(Looking):
    """A pipeline under watch, within a ``with`` statement.

    Attributes:
        course: Of the trajectory that runs, or ran last.
        latents: ``[rows, ...]`` after its last step.
    """

    def __init__(
        self, pipe: Any, after: Sequence[int], dtype: torch.dtype | None = torch.bfloat16
    ) -> None:
        """Prepares.

        Args:
            pipe: Its ``transformer`` is watched.
            after: Blocks passed at each exit.
            dtype: That hidden states are kept in, None for their own.
        """
        super().__init__(pipe.transformer)
        self.pipe, self.after, self.dtype = pipe, after, dtype
        self.course = Course()
        self.latents = torch.empty(0)
        self._scheduler = pipe.scheduler
        self._made: dict[str, Any] | None = None  # the call of the present step
        self._given = torch.empty(0)  # what the pipeline got from it
        self._calls: list[Call] = []
        self._rows = 0
        self._choose: Choose = lambda _: []
        self._translate: Translate = lambda _, hidden: hidden

    def __enter__(self) -> Recorder:
        super().__enter__()
        call_step = type(self._scheduler).step

        def step(scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor,
                 *args: Any, **kwargs: Any) -> Any:  # fmt: skip
            if not self._calls:
                self.course = course_of(scheduler, timestep)
            result = call_step(scheduler, model_output, timestep, sample, *args, **kwargs)
            following = result[0] if isinstance(result, tuple) else result.prev_sample
            self._stepped(model_output, following)
            return result

        swap(self.model, self, {"__call__": lambda _, *args, **kwargs: self._called(args, kwargs)})
        swap(self._scheduler, self, {"step": step})
        return self

    def __exit__(self, *error: Any) -> None:
        restore(self.model)
        restore(self._scheduler)
        super().__exit__(*error)

    def run(
        self, arguments: Mapping[str, Any], rows: int, choose: Choose, translate: Translate
    ) -> list[Call]:
        """One call of the pipeline.

        Args:
            arguments: Of the pipeline.
            rows: Pictures that it makes.
            choose: The exit of every one at each step.
            translate: At that exit.

        Raises:
            UserError: The pipeline calls its model several times a step, or combines the guidance
                branches in a way that is not linear.
        """
        self._rows, self._choose, self._translate = rows, choose, translate
        self._made, self._calls = None, []
        self.pipe(**arguments)
        return self._calls

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._made is not None:
            name = type(self.pipe).__name__
            raise UserError(f"{name}: it calls its model several times a step, expected one call")
        output, hidden = self.watch(self.after, args, kwargs)
        full = output_tensor(output)
        kept = [h.detach().to(self.dtype or h.dtype, copy=True) for h in hidden]
        chosen = list(self._choose(len(self._calls)))
        self._made = {
            "args": args, "kwargs": kwargs, "hidden": kept, "output": full.clone(),
            "chosen": chosen,
        }  # fmt: skip
        self._given = full
        if all(exit is None for exit in chosen):
            return output
        mixed = self._given = self._mixed(hidden, chosen, full, args, kwargs)
        return tree_map_only(Tensor, lambda _: mixed, output)

    def _mixed(
        self,
        hidden: Sequence[Tensor],
        chosen: Sequence[int | None],
        full: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """The outputs of the exits, and of the whole model where none was chosen."""
        states = hidden[0].clone()
        places = [chosen[place % len(chosen)] for place in range(len(full))]
        for exit in {exit for exit in places if exit is not None}:
            rows = [place for place, other in enumerate(places) if other == exit]
            states[rows] = self._translate(exit, hidden[exit][rows])
        early = torch.tensor([exit is not None for exit in places], device=full.device)
        head = self.head(states, args, kwargs)
        return torch.where(early.view(-1, *[1] * (full.ndim - 1)), head, full)

    def _stepped(self, combined: Tensor, following: Tensor) -> None:
        if self._made is None:
            return
        made, self._made = self._made, None
        self.latents = following[: self._rows].detach().clone()
        combined, channels = combined[: self._rows], combined.shape[1]
        if self._calls:
            weights = list(self._calls[0].weights)
        else:
            fitted = fit_weights(
                combined.float(), list(self._given[:, :channels].float().split(self._rows))
            )
            if fitted is None:
                raise UserError(
                    f"{type(self.pipe).__name__}: its guidance is not a weighted sum of the "
                    "model's outputs; turn what rescales it off"
                )
            weights = fitted
        step = len(self._calls)
        self._calls.append(Call(step=step, weights=weights, channels=channels, **made))
