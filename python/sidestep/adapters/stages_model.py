"""The model call of several requests, each of them recorded on its own.

A recorded call has arguments with a line for each row of the batch, and others.  The former become
a request's conditioning, ``[G * n, ...]`` branch by branch; of the latter equal ones are made one
object, since an engine takes requests into the same call only if they hold the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sidestep.adapters.capture import CannotCapture, same_value
from sidestep.adapters.trajectory_record import Trajectory
from sidestep.runtime.denoisers import Place, RecordedArguments, cut, prediction
from sidestep.runtime.engine_conditioning import is_value
from sidestep.runtime.rows import take_arguments

_KEPT = 256  # arguments that all lines share
_DIVISORS = (1, 1000)  # of the scheduler's time, in what pipelines tell their models


@dataclass(frozen=True, eq=False)
class Shared:
    """An argument that all lines of a call share."""

    value: Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is called.

    Attributes:
        key: Of the model.
        sample: Where the latents belong.
        time: Where the time belongs; None for a model that is not told.
        time_dtype: Of the time; float32 where the pipeline gives whole numbers.
        divisor: The time is the scheduler's, divided by it.
        spec: The structure of all arguments.
    """

    key: Hashable
    sample: Place
    time: Place | None
    time_dtype: torch.dtype
    divisor: int
    spec: TreeSpec


@dataclass(frozen=True, eq=False)
class Calling:
    """A recipe with the model it is for."""

    recipe: Recipe
    model: Callable[..., Any]


class SharedArguments:
    """The arguments of the calls of many requests."""

    def __init__(self) -> None:
        """Knows none."""
        self._shared: list[Shared] = []
        self._callings: list[Calling] = []

    def of(self, trajectory: Trajectory) -> Any:
        """The conditioning of a request, from its recorded trajectory.

        Raises:
            CannotCapture: Its model calls are not the same at every step, or they have a part that
                lines of several requests cannot share.
        """
        branches = trajectory.library.branches
        first = branches[0][0]
        self._expect_same(trajectory)
        rows = trajectory.library.rows
        parts = [_lines(known, block, rows) for known, block in branches]
        leaves: list[Any] = []
        for mine in zip(*(part.leaves for part in parts), strict=True):
            if parts[0].by_line[len(leaves)]:
                leaves.append(torch.cat(mine))
                continue
            if not all(same_value(mine[0], other) for other in mine):
                raise CannotCapture(
                    "the pipeline calls its model with other settings for each guidance branch"
                )
            leaves.append(mine[0] if is_value(mine[0]) else self._held(mine[0]))
        if any(part.spec != parts[0].spec for part in parts):
            raise CannotCapture("the pipeline calls its model in another way for each branch")
        dtype, divisor = _time_of(trajectory)
        recipe = Recipe(
            key=first.key, sample=first.sample, time=first.time, time_dtype=dtype, divisor=divisor,
            spec=parts[0].spec,
        )  # fmt: skip
        return self._calling(recipe, first.model), leaves

    def call(
        self,
        x: Tensor,  # [N, ...]
        t: Tensor,  # [N] float32
        conditioning: Any,
    ) -> Tensor:  # [N, ...]
        """The model's prediction for a batch of requests that share a call."""
        calling, leaves = conditioning
        recipe = calling.recipe
        values = [leaf.value if isinstance(leaf, Shared) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(values, recipe.spec)
        time = t.to(recipe.time_dtype)
        if recipe.divisor > 1:
            time = (time / recipe.divisor).to(recipe.time_dtype)
        given = {recipe.sample: x, recipe.time: time}
        positional = [given.get(i, value) for i, value in enumerate(args)]
        named = {name: given.get(name, value) for name, value in kwargs.items()}
        return cut(prediction(calling.model(*positional, **named)), x.shape[1:]).to(x.dtype)

    def _expect_same(self, trajectory: Trajectory) -> None:
        """Raises CannotCapture unless every step calls the same with latents and nothing else."""
        for step in trajectory.steps:
            if any(call.helpers for call in step.calls):
                raise CannotCapture("the pipeline's model has a helper, such as a ControlNet")
        for known in trajectory.library.known:
            if known.around is not None:
                raise CannotCapture("the pipeline's model reads more than latents (inpainting?)")
        places = [list(step.places.values()) for step in trajectory.steps]
        calls = [[id(call.arguments) for call in step.calls] for step in trajectory.steps]
        if any(at != places[0] for at in places) or any(of != calls[0] for of in calls):
            raise CannotCapture("the pipeline's model calls change from step to step")

    def _held(self, value: Any) -> Shared:
        for held in self._shared:
            if same_value(held.value, value):
                return held
        self._shared = [*self._shared[1 - _KEPT :], Shared(value)]
        return self._shared[-1]

    def _calling(self, recipe: Recipe, model: Callable[..., Any]) -> Calling:
        for calling in self._callings:
            if calling.recipe == recipe:
                return calling
        self._callings = [*self._callings[1 - _KEPT :], Calling(recipe, model)]
        return self._callings[-1]


@dataclass(frozen=True)
class _Part:
    """The arguments of a branch: leaves, which of them have a line for each row, and the rest."""

    leaves: list[Any]
    by_line: list[bool]
    spec: TreeSpec


def _lines(known: RecordedArguments, block: int, rows: int) -> _Part:
    """The arguments of a branch.

    Raises:
        CannotCapture: A list has an entry for each line.
    """
    args, kwargs, batch = known.args, known.kwargs, known.batch

    def take(lines: Sequence[int]) -> tuple[list[Any], TreeSpec]:
        return tree_flatten(take_arguments(args, kwargs, torch.tensor(lines), batch))

    leaves, spec = take(range(block * rows, (block + 1) * rows))
    whole, own = tree_flatten((args, kwargs))
    longer, others = take([0] * (batch + 1))  # what belongs to the batch grows with it
    if others != own:
        raise CannotCapture("the pipeline gives its model a list with an entry for each line")
    by_line = [
        isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch + 1 and leaf is not old
        for leaf, old in zip(longer, whole, strict=True)
    ]
    return _Part(leaves, by_line, spec)


def _time_of(trajectory: Trajectory) -> tuple[torch.dtype, int]:
    """The dtype of the time that the model is told, and by what the scheduler's was divided.

    Raises:
        CannotCapture: It is made of the scheduler's time in another way.
    """
    given = [torch.as_tensor(step.calls[0].time).flatten()[:1] for step in trajectory.steps]
    if trajectory.steps[0].calls[0].arguments.time is None:
        return torch.float32, 1
    told = torch.cat(given).cpu()
    times = torch.tensor(trajectory.plan.timesteps, dtype=torch.float32).to(told.dtype)
    for divisor in _DIVISORS:
        if torch.equal(times if divisor == 1 else (times / divisor).to(told.dtype), told):
            # whole times as float32, so that samplers with and without fractions share calls
            return told.dtype if told.is_floating_point() else torch.float32, divisor
    raise CannotCapture(
        "the pipeline tells its model a time that is neither its scheduler's nor a thousandth of it"
    )
