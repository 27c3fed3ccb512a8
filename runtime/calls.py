"""One of the model calls that a host makes at every step: evaluating some rows, holding outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidestep.runtime import ranges
from sidestep.runtime.held import HeldOutput
from sidestep.runtime.rows import find_condition, find_sample, take_arguments, take_rows
from sidestep.runtime.upload import upload


@dataclass(frozen=True, eq=False)
class Arguments:
    """What the host calls a model with."""

    model: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def sample(self) -> Tensor | None:
        """The model's main input ``[batch, ...]``; None where there is no batch to take rows of."""
        return find_sample(self.args, self.kwargs)

    @property
    def condition(self) -> tuple[Tensor, int] | None:
        """What tells guidance branches apart, and how often it was written to."""
        tensor = find_condition(self.args, self.kwargs)
        if tensor is None:
            return None
        return tensor, -1 if tensor.is_inference() else tensor._version

    def evaluate(self) -> Any:
        """The output of the whole batch, from untouched arguments."""
        with ranges.within("model"):
            return self.model(*self.args, **self.kwargs)

    def evaluate_rows(self, rows: Sequence[int], batch: int, sizes: set[int] | None) -> Any:
        """The output of some rows of the batch.

        Args:
            rows: Which.
            batch: Rows of the whole batch.
            sizes: Batch sizes that the model may be given, None for any. The batch is filled up
                with copies of a row, or the whole one is evaluated: no other row's output is used.
        """
        sample = self.sample
        assert sample is not None
        size = min((s for s in sizes or () if s >= len(rows)), default=len(rows))
        if size == batch:
            return take_rows(self.evaluate(), upload(rows, torch.int64, sample.device), batch)
        places = [*rows, *[rows[0]] * (size - len(rows))]
        index = upload(places, torch.int64, sample.device)
        args, kwargs = take_arguments(self.args, self.kwargs, index, batch)
        with ranges.within("model"):
            part = self.model(*args, **kwargs)
        if size == len(rows):
            return part
        return take_rows(part, upload(range(len(rows)), torch.int64, sample.device), size)


@dataclass(eq=False)
class Call:
    """One of the model calls of a step, such as a guidance branch.

    Attributes:
        held: Its last outputs.
        made: Whether it was made in the current step.
        condition: What it was last made with.
        steady: Whether the host gave the very same prompt embedding twice running.
    """

    held: HeldOutput | None = None
    made: bool = False
    condition: tuple[Tensor, int] | None = None
    steady: bool = False

    def is_for(self, condition: tuple[Tensor, int] | None) -> bool:
        """Whether the embedding is, as an object, the one this call was last made with."""
        if condition is None or self.condition is None:
            return False
        return condition[0] is self.condition[0] and condition[1] == self.condition[1]

    def make(
        self,
        arguments: Arguments,
        compute: list[int] | None,
        *,
        step: int,
        history: int,
        sizes: set[int] | None,
    ) -> Any:
        """Calls the model and holds what it returns.

        Args:
            arguments: The call.
            compute: Rows of its batch to evaluate, None for all with nothing reused.
            step: The step that it belongs to.
            history: Outputs to hold of each row.
            sizes: Batch sizes to keep to, None for any.

        Returns:
            The output if all rows were evaluated, else None: it is in `held`.
        """
        sample, output = arguments.sample, None
        if compute is None:
            output = arguments.evaluate()
            if sizes is not None and sample is not None:
                sizes.add(len(sample))
            another = self.steady and not self.is_for(arguments.condition)
            held = None if another else self.held  # nothing of another prompt is extrapolated from
            if held is not None and sample is not None and held.fits(sample, output):
                held.put(output, range(len(sample)), step)
            else:
                self.held = HeldOutput.of(sample, output, history, step)
        elif compute:
            assert self.held is not None and sample is not None
            part = arguments.evaluate_rows(compute, len(sample), sizes)
            self.held.put(part, compute, step)
        # Only now that the model has succeeded: the host may try again.
        self.made = True
        self.steady = self.is_for(arguments.condition)
        self.condition = arguments.condition
        return output
