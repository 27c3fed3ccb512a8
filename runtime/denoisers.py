"""Model calls for any rows of a batch, made of the arguments of calls that a host would have made.

A host's model call has a batch of ``[branch 0: all rows; branch 1: all rows; ...]``, one latent and
one time for every line of it, and further arguments: tensors with a line for every line of the
batch, and whatever all lines share. `RecordedArguments` keeps these and can make the call again for
some lines only, with other latents and times; `RecordedDenoiser` knows which line of which call
stands for a branch of a row at a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from sidestep.runtime import ranges
from sidestep.runtime.exits.draft import Drafting
from sidestep.runtime.rows import take_arguments, take_rows
from sidestep.runtime.upload import upload

Place = int | str
"""Where an argument is: its index, or its name."""


@dataclass(frozen=True)
class FromHelper:
    """An argument that another network of the same step returns, such as a ControlNet.

    Attributes:
        helper: Which of them.
        leaf: Which of the values it returns.
    """

    helper: int
    leaf: int


@dataclass(kw_only=True, eq=False)
class RecordedArguments:
    """A model call without its latents and times.

    Attributes:
        model: The model, ``model(*args, **kwargs)``.
        args: Positional arguments; those at ``sample`` and ``time`` are not used.
        kwargs: Arguments by name, likewise.
        sample: Where the latents belong.
        time: Where the time belongs; None for a model that is not told.
        batch: Lines of the batch.
        dtype: Of the latents.
        around: None, or ``[batch, ...]``: the model's input has more than the latents, and this is
            the whole of it with zeros in their place.
        region: ``(dim, start)`` of the latents in ``around``.
        whole: Whether the model is to be called with whole batches only, filled up with copies of
            a line: for a compiled model, to which every other size is a compilation.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sample: Place
    time: Place | None
    batch: int
    dtype: torch.dtype
    around: Tensor | None = None
    region: tuple[int, int] = (1, 0)
    whole: bool = False

    @property
    def key(self) -> Hashable:
        """Of the model: a bound call is made anew each time, but not what is bound."""
        model = self.model
        if isinstance(model, functools.partial):
            return (id(model.func), *map(id, model.args))
        return id(model)

    def call(
        self,
        x: Tensor,  # [n, ...]
        lines: Sequence[int],  # [n]
        time: Any,
        helped: Sequence[Sequence[Any]] = (),
    ) -> Any:
        """What the model returns for some lines of the batch.

        Args:
            x: Their latents, scaled as the model reads them.
            lines: Which lines.
            time: The time as the model is told: one for all of them, or ``[n, ...]``.
            helped: What the helpers of the step return for these lines.
        """
        return self.take(lines, x.device).make(x, time, helped)

    def take(self, lines: Sequence[int], device: torch.device) -> RecordedArguments:
        """Those of a call with some lines of the batch only."""
        if list(lines) == list(range(self.batch)):
            return self
        index = upload(lines, torch.int64, device)
        args, kwargs = take_arguments(self.args, self.kwargs, index, self.batch)
        around = take_rows(self.around, index, self.batch)
        return replace(self, args=args, kwargs=kwargs, around=around, batch=len(lines))

    def make(
        self,
        x: Tensor,  # [batch, ...]
        time: Any,
        helped: Sequence[Sequence[Any]] = (),
    ) -> Any:
        """What the model returns for the whole batch; see `call`."""
        x = x.to(self.dtype)
        args, kwargs = self.args, self.kwargs
        if self.around is not None:
            dim, start = self.region
            around = self.around.clone()
            around.narrow(dim, start, x.shape[dim]).copy_(x)
            x = around
        if helped:
            args, kwargs = tree_map_only(
                FromHelper, lambda link: helped[link.helper][link.leaf], (args, kwargs)
            )
        given = {self.sample: x} | ({} if self.time is None else {self.time: time})
        positional = [given.get(i, value) for i, value in enumerate(args)]
        named = {name: given.get(name, value) for name, value in kwargs.items()}
        return self.model(*positional, **named)


def prediction(output: Any) -> Tensor:  # [batch, ...]
    """The tensor in what a model returned: the first, as every pipeline takes it.

    Raises:
        ValueError: There is none.
    """
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise ValueError(f"the model returned {type(output).__name__} without a tensor in it")


def cut(output: Tensor, shape: Sequence[int]) -> Tensor:  # [n, ...] -> [n, *shape]
    """What belongs to the latents: a model may predict more channels or tokens, at their end."""
    for dim, size in enumerate(shape, start=1):
        if output.shape[dim] != size:
            output = output.narrow(dim, 0, size)
    return output


@dataclass(kw_only=True, eq=False)
class RecordedCall:
    """One model call of a step.

    Attributes:
        arguments: What it is made of; many steps share them.
        time: The time as the host gave it: a number, ``[]``, or ``[batch, ...]``.
        output: ``[batch, ...]`` where the call was made already; None where it was not.
        helpers: The calls that its `FromHelper` arguments come from, with the same batch.
    """

    arguments: RecordedArguments
    time: Any
    output: Tensor | None = None
    helpers: tuple[RecordedCall, ...] = ()

    @property
    def key(self) -> Hashable:
        """Equal for calls that can be made together."""
        if self.output is not None:
            return id(self)
        return (id(self.arguments), *(id(helper.arguments) for helper in self.helpers))


@dataclass(kw_only=True, eq=False)
class RecordedStep:
    """The model calls of one step.

    Attributes:
        calls: In the order of the host.
        places: For each branch ``(call, block)``: the lines ``block * rows`` and following of that
            call. A branch that the host leaves out at this step is not in it.
    """

    calls: list[RecordedCall]
    places: dict[int, tuple[int, int]]


@dataclass(kw_only=True, eq=False)
class RecordedDenoiser:
    """Evaluates any branches of any rows, each at its own step, in as few calls as that takes.

    Attributes:
        rows: Rows of the trajectory.
        shape: Of one latent.
        steps: What the host would have called, step by step.
        mixes: None, or for each step the weights ``[branches, ...]`` that combine the branches
            element by element; the denoiser then has a single branch, the combined one.
        drafting: Cuts those evaluations short that only serve a draft; None to cut nothing.
        ticks: Model calls made.
    """

    rows: int
    shape: torch.Size
    steps: list[RecordedStep]
    mixes: list[Tensor] | None = None
    drafting: Drafting | None = None
    ticks: int = 0

    def __call__(
        self,
        x: Tensor,  # [n, *shape]
        lines: Sequence[tuple[int, int, int]],  # [n] of (step, row, branch)
        coarse: Sequence[bool] = (),  # [n]
    ) -> Tensor:  # [n, *shape]
        """The model's prediction for every line; zeros for a branch the step does not have.

        Args:
            x: The latents, scaled as the model reads them.
            lines: Which branch of which row, and the step it is at.
            coarse: Whether it only serves a draft; empty for none.
        """
        coarse = coarse or [False] * len(lines)
        if self.mixes is None:
            return self._evaluate(x, lines, coarse)
        mixes = torch.stack([self.mixes[step] for step, _, _ in lines], dim=1).to(x.device)
        branches = range(len(mixes))
        spread = [(step, row, branch) for branch in branches for step, row, _ in lines]
        wide = torch.cat([x] * len(branches))
        outputs = self._evaluate(wide, spread, [*coarse] * len(branches))
        mixed = (mixes * outputs.float().unflatten(0, (len(branches), -1))).sum(0)
        return mixed.to(outputs.dtype)

    def _evaluate(
        self, x: Tensor, lines: Sequence[tuple[int, int, int]], coarse: Sequence[bool]
    ) -> Tensor:
        result: Tensor | None = None
        groups: dict[Hashable, list[tuple[int, int]]] = {}
        calls: dict[int, RecordedCall] = {}
        for i, (step, row, branch) in enumerate(lines):
            place = self.steps[step].places.get(branch)
            if place is None:
                continue
            call = self.steps[step].calls[place[0]]
            calls[i] = call
            groups.setdefault(call.key, []).append((place[1] * self.rows + row, i))
        for group in groups.values():
            group.sort()  # the host's own order
            at = [i for _, i in group]
            drafts = [lines[i][0] if coarse[i] else None for i in at]
            part = self._call(x[at], [line for line, _ in group], [calls[i] for i in at], drafts)
            if result is None:
                result = torch.zeros(x.shape, dtype=part.dtype, device=x.device)
            result[at] = part.to(result.dtype)
        return torch.zeros_like(x) if result is None else result

    def _call(
        self,
        x: Tensor,  # [n, *shape]
        lines: Sequence[int],  # [n]
        calls: Sequence[RecordedCall],  # [n], with the same arguments
        drafts: Sequence[int | None],  # [n], the step of those that may be cut short
    ) -> Tensor:  # [n, *shape]
        first = calls[0]
        if first.output is not None:
            return cut(first.output[list(lines)], self.shape)
        self.ticks += 1
        count, batch = len(lines), first.arguments.batch
        if first.arguments.whole and count < batch:
            more = batch - count
            lines, calls = [*lines, *[lines[0]] * more], [*calls, *[first] * more]
            x = torch.cat([x, x[:1].expand(more, *self.shape)])
        helped = [
            tree_leaves(_make([call.helpers[h] for call in calls], x, lines))
            for h in range(len(first.helpers))
        ]
        kwargs, drafting = first.arguments.kwargs, self.drafting
        cutting = nullcontext() if drafting is None else drafting.call(drafts, kwargs)
        with ranges.within("model"), cutting:
            output = _make(calls, x, lines, helped)
        return cut(prediction(output)[:count], self.shape)


def _make(
    calls: Sequence[RecordedCall],  # [n], with the same arguments
    x: Tensor,  # [n, *shape]
    lines: Sequence[int],  # [n]
    helped: Sequence[Sequence[Any]] = (),
) -> Any:
    """One model call, each line at the time of its own."""
    arguments = calls[0].arguments
    time = join_times([call.time for call in calls], lines, arguments.batch)
    if isinstance(time, Tensor) and time.dim():
        time = time.to(x.device)  # a scheduler may have its times on the host
    return arguments.call(x, lines, time, helped)


def join_times(
    times: Sequence[Any],  # [n] of a number, [] or [batch, ...]
    lines: Sequence[int],  # [n]
    batch: int,
) -> Any:
    """The times of some lines as one argument; as the host gave it where that says the same."""
    if all(time is times[0] for time in times):
        whole = list(lines) == list(range(batch))
        if whole or not isinstance(times[0], Tensor) or times[0].dim() == 0:
            return times[0]
    parts = [t if isinstance(t, Tensor) else torch.tensor(t, device="cpu") for t in times]
    return torch.stack(
        [part[line] if part.dim() else part for part, line in zip(parts, lines, strict=True)]
    )
