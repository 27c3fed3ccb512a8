"""What a pipeline gives its model at every step, kept once and compared from step to step.

While a trajectory is recorded the latents change from step to step in a way that the pipeline knows
nothing of. An argument that is not the same as in the first step, line by line, may therefore have
been computed from the latents, and the recording is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from sidestep.runtime.denoisers import (
    FromHelper,
    Place,
    RecordedArguments,
    RecordedCall,
    RecordedStep,
)
from sidestep.runtime.rows import find_sample

_TIME_NAMES = ("timestep", "timesteps", "t")
_AROUND = "its input beside the latents"


class CannotCapture(ValueError):
    """A pipeline does something that the whole-trajectory driver cannot take over."""


@dataclass(kw_only=True, eq=False)
class Call:
    """A model call of the pipeline as it was made.

    Attributes:
        arguments: All of it but latents and time.
        sample: The model's input, ``[batch, ...]``.
        time: The time, as it was given.
        probe: What the pipeline was given back, ``[batch, ...]``; None for a helper.
        output: The model's own output where it was called.
    """

    arguments: RecordedArguments
    sample: Tensor
    time: Any
    probe: Tensor | None = None
    output: Tensor | None = None


def read_call(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    made: Mapping[int, tuple[Tensor, FromHelper]],
    *,
    whole: bool = False,
) -> Call:
    """A model call: its arguments, its input and its time.

    Containers are copied, because a pipeline may change them between two calls.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its arguments by name.
        made: By id, the tensors that helpers of this step have returned.
        whole: Whether a new batch size costs the model a compilation.

    Raises:
        CannotCapture: The call has no batch of latents, or depends on the calls before it.
    """
    _refuse_cache(network_of(model))
    sample = find_sample(args, kwargs)
    if sample is None:
        raise CannotCapture(
            "enable: the model was called without latents as its first argument, or as `sample` or "
            "`hidden_states`; use driver='stepwise'"
        )
    at: Place = next((i for i, value in enumerate(args[:1]) if value is sample), "")
    if at == "":
        at = next(name for name, value in kwargs.items() if value is sample)
    time = _time_place(model, args, kwargs, at)
    value = None if time is None else args[time] if isinstance(time, int) else kwargs[time]
    if isinstance(value, Tensor):
        value = value.clone()  # a pipeline may write the next time into the same tensor
    holes = {at, time}

    def link(leaf: Any) -> Any:
        return made[id(leaf)][1] if id(leaf) in made else leaf

    arguments = RecordedArguments(
        model=model,
        args=tuple(None if i in holes else tree_map(link, a) for i, a in enumerate(args)),
        kwargs={n: None if n in holes else tree_map(link, a) for n, a in kwargs.items()},
        sample=at,
        time=time,
        batch=len(sample),
        dtype=sample.dtype,
        whole=whole,
    )
    return Call(arguments=arguments, sample=sample, time=value)


def network_of(model: Callable[..., Any]) -> Any:
    """What a bound call calls."""
    return model.args[0] if isinstance(model, functools.partial) and model.args else model


def _refuse_cache(network: Any) -> None:
    if getattr(network, "is_cache_enabled", False):
        raise CannotCapture(
            f"enable: {type(network).__name__} has a cache of diffusers enabled, which needs its "
            "calls in the pipeline's own order; call its disable_cache() first"
        )


def _time_place(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], sample: Place
) -> Place | None:
    for name in _TIME_NAMES:
        if name in kwargs:
            return name
    inner = network_of(model)
    names = list(inspect.signature(getattr(inner, "forward", inner)).parameters)
    for i, name in enumerate(names[: len(args)]):
        if name in _TIME_NAMES and i != sample:
            return i
    return None


@dataclass(eq=False)
class Library:
    """The arguments of all calls so far, each kept once, and the branches among them.

    Attributes:
        rows: Rows of the trajectory.
        known: RecordedArguments that differ.
        branches: For each branch the arguments and the block of lines in which it was first seen.
    """

    rows: int
    known: list[RecordedArguments] = field(default_factory=list)
    branches: list[tuple[RecordedArguments, int]] = field(default_factory=list)
    _leaves: dict[int, dict[str, Any]] = field(default_factory=dict)
    _versions: dict[int, int] = field(default_factory=dict)

    def record(self, calls: Sequence[Call], helpers: Sequence[Call], first: bool) -> RecordedStep:
        """The calls of one step, with what is known already in the place of what is equal to it.

        Args:
            calls: Of the model.
            helpers: Of the networks that feed it.
            first: Whether it is the first step: later ones must not bring new tensors.

        Raises:
            CannotCapture: An argument changes from step to step.
        """
        recorded: list[RecordedCall] = []
        places: dict[int, tuple[int, int]] = {}
        helping = tuple(
            RecordedCall(arguments=self._intern(call.arguments, first), time=call.time)
            for call in helpers
        )
        for c, call in enumerate(calls):
            arguments = self._intern(call.arguments, first)
            linked = any(isinstance(v, FromHelper) for v in self._leaves[id(arguments)].values())
            if linked and any(h.arguments.batch != arguments.batch for h in helping):
                raise CannotCapture(
                    "enable: a helper of the model, such as a ControlNet, has a batch of another "
                    "size; the whole-trajectory driver cannot take that over, use driver='stepwise'"
                )
            recorded.append(
                RecordedCall(
                    arguments=arguments,
                    time=call.time,
                    output=call.output,
                    helpers=helping if linked else (),
                )
            )
            for block in range(arguments.batch // self.rows):
                places[self._branch(arguments, block, places)] = (c, block)
        return RecordedStep(calls=recorded, places=places)

    def _intern(self, new: RecordedArguments, first: bool) -> RecordedArguments:
        leaves = _flatten(new)
        for known in self.known:
            if self._equal(known, new, leaves):
                return known
        if not first:
            self._expect_known(new, leaves)
        self.known.append(new)
        self._leaves[id(new)] = leaves
        for leaf in leaves.values():
            if isinstance(leaf, Tensor):
                self._versions.setdefault(id(leaf), _version(leaf))
        return new

    def _equal(
        self, known: RecordedArguments, new: RecordedArguments, leaves: dict[str, Any]
    ) -> bool:
        old = self._leaves[id(known)]
        return (
            known.key == new.key
            and (known.sample, known.time, known.batch, known.dtype, known.region)
            == (new.sample, new.time, new.batch, new.dtype, new.region)
            and old.keys() == leaves.keys()
            and all(same_value(old[path], leaves[path]) for path in leaves)
        )

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """All values that are kept, with what they are called."""
        for known in self.known:
            yield from self._leaves[id(known)].items()

    def expect_unwritten(self) -> None:
        """Raises CannotCapture if the pipeline has written into a tensor that is kept."""
        for leaves in self._leaves.values():
            for path, leaf in leaves.items():
                if isinstance(leaf, Tensor) and self._versions[id(leaf)] != _version(leaf):
                    raise CannotCapture(
                        f"enable: the pipeline has written into the model's argument {path} after "
                        "a call, which the whole-trajectory driver cannot follow; use "
                        "driver='stepwise'"
                    )

    def _expect_known(self, new: RecordedArguments, leaves: dict[str, Any]) -> None:
        """Raises CannotCapture unless every line of every tensor was there before."""
        for path, leaf in leaves.items():
            if not isinstance(leaf, Tensor):
                continue
            seen = [
                block
                for known in self.known
                if isinstance(old := self._leaves[id(known)].get(path), Tensor)
                for block in self._blocks(old, known.batch)
            ]
            for block in self._blocks(leaf, new.batch):
                if not any(same_value(old, block) for old in seen):
                    raise CannotCapture(
                        f"enable: the model's argument {path} changes from step to step, perhaps "
                        "with the latents, as the residuals of a ControlNet do; the "
                        "whole-trajectory driver cannot take that over, use driver='stepwise'"
                    )

    def _blocks(self, leaf: Tensor, batch: int) -> list[Tensor]:
        """What each branch reads of a tensor: its own lines, or all of it."""
        if leaf.dim() == 0 or len(leaf) != batch:
            return [leaf]
        return list(leaf.split(self.rows))

    def _branch(self, new: RecordedArguments, block: int, taken: Mapping[int, object]) -> int:
        """The number of a branch: that of an equal one that is not taken, or a new one."""
        for branch, (known, place) in enumerate(self.branches):
            if branch in taken:
                continue
            if (known is new and place == block) or self._equal_blocks(known, place, new, block):
                return branch
        self.branches.append((new, block))
        return len(self.branches) - 1

    def _equal_blocks(
        self, known: RecordedArguments, place: int, new: RecordedArguments, block: int
    ) -> bool:
        if known is new:  # two branches of one call are two, even on equal prompts
            return False
        old, leaves = self._leaves[id(known)], self._leaves[id(new)]
        if old.keys() != leaves.keys():
            return False
        for path, leaf in leaves.items():
            mine, other = leaf, old[path]
            if isinstance(mine, Tensor) and isinstance(other, Tensor):
                blocks, others = self._blocks(mine, new.batch), self._blocks(other, known.batch)
                mine, other = blocks[block % len(blocks)], others[place % len(others)]
            if not same_value(other, mine):
                return False
        return True


def same_value(a: Any, b: Any) -> bool:
    """Whether two arguments are the same; tensors by value."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    try:
        return type(a) is type(b) and bool(a == b)
    except (ValueError, RuntimeError):  # arrays and such have no single answer
        return False


def _flatten(arguments: RecordedArguments) -> dict[str, Any]:
    """Every value by its path; the input beside the latents is one of them."""
    paths: dict[str, Any] = {}
    for tree in (arguments.args, arguments.kwargs):
        for path, leaf in tree_flatten_with_path(tree)[0]:
            paths[keystr(path)] = leaf
    if arguments.around is not None:
        paths[_AROUND] = arguments.around
    return paths


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; always 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version
