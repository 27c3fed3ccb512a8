"""Ticks of a recorded trajectory: from CUDA graphs where they can be, else launched one by one.

The rows of a tick may be at steps whose model calls differ: guidance has ended for some of them,
another model takes over, a ControlNet is scaled down.  Steps whose calls are made of the same
arguments are of one *kind*; a tick is taken kind by kind, each by a graph of its own.  What is the
same in all steps of a kind (prompt embeddings, images, added conditions) is in static tensors that
are filled once for a generation; times are filled in at every tick.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from sidestep.runtime.denoisers import (
    FromHelper,
    RecordedArguments,
    RecordedCall,
    RecordedDenoiser,
    RecordedStep,
    cut,
    prediction,
)
from sidestep.runtime.engine_conditioning import kind_of
from sidestep.runtime.engine_step import Taken, Tick, by_outputs
from sidestep.runtime.graphs import Call, Inputs, TickGraphs
from sidestep.runtime.graphs_layout import Layout
from sidestep.runtime.upload import select

Kind = tuple[Hashable, ...]


class _Network:
    """One of the networks that a step calls, at all steps of a kind.

    Attributes:
        arguments: Of its call.
        shell: The same without them, which is all that a graph keeps.
    """

    def __init__(self, calls: Sequence[RecordedCall], device: torch.device) -> None:
        """Of that call in each of the steps."""
        self.arguments, self._device = calls[0].arguments, device
        self.shell = replace(self.arguments, args=(), kwargs={}, around=None)
        self._times = self._join([call.time for call in calls])  # [steps, batch, ...]
        self._taken: tuple[Sequence[int], RecordedArguments] | None = None

    def _join(self, times: Sequence[Any]) -> Tensor | None:
        batch = self.arguments.batch
        if self.arguments.time is None:
            return None
        tensors = [torch.as_tensor(t, device=self._device) for t in times]
        return torch.stack([t if t.dim() else t.expand(batch) for t in tensors])

    def tree(self, lines: Sequence[int], steps: Sequence[Sequence[int]]) -> tuple[Any, ...]:
        """Its arguments for some lines of the batch, and the times of m steps ``[m, n, ...]``.

        Args:
            lines: ``[n]``; while they stay the same, so do the tensors.
            steps: ``[m][n]``, counted within the kind.
        """
        if self._taken is None or self._taken[0] != lines:
            self._taken = lines, self.arguments.take(lines, self._device)
        taken, times = self._taken[1], self._times
        if times is not None:
            batch = self.arguments.batch
            places = [
                step * batch + line
                for of_one in steps
                for step, line in zip(of_one, lines, strict=True)
            ]
            times = select(times.flatten(0, 1), places).unflatten(0, (len(steps), len(lines)))
        return taken.args, taken.kwargs, taken.around, times

    @property
    def key(self) -> Hashable:
        """Of what is no leaf of the tree."""
        shell = self.shell
        return (shell.key, shell.sample, shell.time, shell.dtype, shell.region)


@dataclass(frozen=True, eq=False)
class _Slot:
    """A model call of a kind.

    Attributes:
        branches: The guidance branches in it.
        blocks: Of each, where its lines are in the batch.
        networks: The model, and the helpers that feed it.
    """

    branches: tuple[int, ...]
    blocks: tuple[int, ...]
    networks: tuple[_Network, ...]


class Calls:
    """The model calls of one kind of step.

    Attributes:
        slots: In the order of the host.
    """

    def __init__(
        self,
        denoiser: RecordedDenoiser,
        steps: Sequence[int],
        branches: int,
        device: torch.device,
    ) -> None:
        """Reads them from the record.

        Args:
            denoiser: What was recorded.
            steps: All of this kind.
            branches: G.
            device: Of the model.
        """
        self._rows, self._shape, self._branches = denoiser.rows, denoiser.shape, branches
        self._at = {step: i for i, step in enumerate(steps)}
        made = [denoiser.steps[step] for step in steps]
        self.slots: list[_Slot] = []
        for c, call in enumerate(made[0].calls):
            own = sorted((b, g) for g, (at, b) in made[0].places.items() if at == c)
            if own:
                of_model = _Network([step.calls[c] for step in made], device)
                helpers = [
                    _Network([step.calls[c].helpers[h] for step in made], device)
                    for h in range(len(call.helpers))
                ]
                blocks, numbers = zip(*own, strict=True)
                self.slots.append(_Slot(numbers, blocks, (of_model, *helpers)))

    def prepare(self, tick: Tick, layout: Layout, steps: int) -> Inputs:
        """See `sidestep.runtime.graphs.Prepare`."""
        width = tick.entries // self._branches  # entries of each branch
        rows = [tick.rows[i] for i in layout.positions[:width]]
        told = []
        for slot in self.slots:
            lines = [block * self._rows + row.index for block in slot.blocks for row in rows]
            places = [
                [self._at[row.step + j] for _ in slot.blocks for row in rows] for j in range(steps)
            ]
            told.append([network.tree(lines, places) for network in slot.networks])
        leaves, spec = tree_flatten(told)
        static = [isinstance(leaf, Tensor) for leaf in leaves]
        values = [
            leaf if isinstance(leaf, FromHelper) else kind_of(leaf)
            for leaf, filled in zip(leaves, static, strict=True)
            if not filled
        ]
        slots = [(s.branches, *(network.key for network in s.networks)) for s in self.slots]
        key = (str(spec), *values, *slots)
        return Inputs(leaves, spec, static, key, self._call(tick.state.dtype))

    def _call(self, dtype: torch.dtype) -> Call:
        """What is captured: it holds nothing of the generation."""
        count, shape = self._branches, self._shape
        slots = [(s.branches, [network.shell for network in s.networks]) for s in self.slots]

        def call(x: Tensor, t: Tensor, given: Any, j: int) -> Tensor:  # [G * width, *shape]
            blocks, outputs = x.chunk(count), dict[int, Tensor]()
            for (branches, (model, *helpers)), (of_model, *of_helpers) in zip(
                slots, given, strict=True
            ):
                entries = torch.cat([blocks[g] for g in branches])
                helped = [
                    tree_leaves(_make(helper, tree, entries, j))
                    for helper, tree in zip(helpers, of_helpers, strict=True)
                ]
                output = cut(prediction(_make(model, of_model, entries, j, helped)), shape)
                for g, part in zip(branches, output.to(dtype).chunk(len(branches)), strict=True):
                    outputs[g] = part
            for g in range(count):
                if g not in outputs:  # a branch that the step does not have
                    outputs[g] = torch.zeros_like(blocks[g], dtype=dtype)
            return torch.cat([outputs[g] for g in range(count)])

        return call


def _make(
    shell: RecordedArguments,
    tree: tuple[Any, ...],
    x: Tensor,  # [n, *shape]
    j: int,
    helped: Sequence[Sequence[Any]] = (),
) -> Any:
    """One call at step j of a chain."""
    args, kwargs, around, times = tree
    filled = replace(shell, args=args, kwargs=kwargs, around=around, batch=len(x))
    return filled.make(x, None if times is None else times[j], helped)


class RecordedTicks:
    """Takes the ticks of one generation for `Engine.tick`.

    Attributes:
        graphs: What captures and replays; None once it does not.
        reason: Why it does not, if it should have.
        cramped: Whether that is memory, of which there may be enough another time.
    """

    def __init__(
        self,
        denoiser: RecordedDenoiser,
        branches: int,
        buckets: Sequence[int] = (),
        graphs: TickGraphs | None = None,
    ) -> None:
        """Captures nothing yet.

        Args:
            denoiser: What was recorded.
            branches: G of every row.
            buckets: Sizes of a model call from a graph, ascending, multiples of G.
            graphs: What captures and replays, for many generations of one engine; None to launch.
        """
        self.graphs, self.reason, self.cramped = graphs, "", False
        self._denoiser, self._branches, self._buckets = denoiser, branches, buckets
        self._kinds = [_kind(step) for step in denoiser.steps]
        self._calls: dict[Kind, Calls] = {}

    def __call__(self, tick: Tick) -> Taken:
        """Makes the model calls of some rows and takes their step, or several."""
        by_kind: dict[Kind | None, list[int]] = {}
        for i, row in enumerate(tick.rows):
            by_kind.setdefault(self._kinds[row.step], []).append(i)
        foreseen = 1
        if len(by_kind) == 1:
            foreseen = min(tick.foreseen, *(self._run(row.step) for row in tick.rows))
        parts = []
        for kind, at in by_kind.items():
            rows, noise = [tick.rows[i] for i in at], [tick.noise[i] for i in at]
            part = self._take(kind, replace(tick, rows=rows, noise=noise, foreseen=foreseen))
            if len(by_kind) > 1:  # the next one writes where this one has its results
                outputs = [u.clone() for u in part.outputs]
                part = replace(
                    part, outputs=outputs, weights=part.weights.clone(), stats=part.stats.clone()
                )
            parts.append(part)
        return parts[0] if len(parts) == 1 else _joined(tick, [*by_kind.values()], parts)

    def _run(self, step: int) -> int:
        """Steps of one kind from here on."""
        kinds, end = self._kinds, step + 1
        while end < len(kinds) and kinds[end] == kinds[step]:
            end += 1
        return end - step

    def _take(self, kind: Kind | None, tick: Tick) -> Taken:
        graphs, calls = self.graphs, None
        if kind is not None and graphs is not None:
            calls = self._calls_of(kind, tick.state.device)
        if graphs is None or calls is None:
            return self._launch(tick)
        size = next(b for b in self._buckets if b >= self._branches * len(tick.rows))
        taken = None
        try:
            taken = graphs.take(replace(tick, entries=size), calls.prepare)
        except torch.OutOfMemoryError as error:
            if graphs.begun:
                raise
            self._give_up(f"out of memory: {str(error).splitlines()[0]}", cramped=True)
        if taken is None:  # not above, where the error still holds the tensors of its frames
            return self._launch(tick)
        self._denoiser.ticks += taken.steps * len(calls.slots)
        if graphs.failure is not None:
            cause = graphs.failure.__cause__
            self._give_up(str(graphs.failure), isinstance(cause, torch.OutOfMemoryError))
        return taken

    def _calls_of(self, kind: Kind, device: torch.device) -> Calls | None:
        """None, and no graphs from now on, where the times of its steps do not go together."""
        if kind not in self._calls:
            steps = [step for step, of in enumerate(self._kinds) if of == kind]
            try:
                self._calls[kind] = Calls(self._denoiser, steps, self._branches, device)
            except (RuntimeError, TypeError) as error:
                self._give_up(f"the times of the model calls cannot be put together: {error}")
                return None
        return self._calls[kind]

    def _give_up(self, reason: str, cramped: bool = False) -> None:
        if self.graphs is not None:
            self.graphs.forget()
            self.graphs.failure = None
        self.graphs, self.reason, self.cramped = None, reason, cramped

    def _launch(self, tick: Tick) -> Taken:
        """Operator by operator, as many entries as are needed."""
        count, state = self._branches, tick.state
        lines = [(row.step, row.index, g) for g in range(count) for row in tick.rows]
        coarse = [row.coarse for row in tick.rows] * count
        x, _ = state.inputs([*tick.rows] * count)
        whole = self._denoiser(x, lines, coarse).to(state.dtype)
        outputs = whole.flatten(1).contiguous().chunk(count)
        return by_outputs(state, lambda rows: outputs)(tick.rows, tick.noise)


def _kind(step: RecordedStep) -> Kind | None:
    """Equal for steps whose calls a graph can stand for alike; None where an output is known."""
    if any(call.output is not None for call in step.calls):
        return None
    return (*(call.key for call in step.calls), *sorted(step.places.items()))


def _joined(tick: Tick, members: Sequence[list[int]], parts: Sequence[Taken]) -> Taken:
    """What the parts of a tick have come to, in the order of its rows."""
    places = [i for at in members for i in at]
    order = sorted(range(len(places)), key=places.__getitem__)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return select(torch.cat(list(tensors)), order)

    outputs = [join(of_branch) for of_branch in zip(*(p.outputs for p in parts), strict=True)]
    weights, stats = join([p.weights for p in parts]), join([p.stats for p in parts])
    return Taken(tick.rows, outputs, weights, stats)
