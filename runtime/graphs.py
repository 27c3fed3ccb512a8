"""CUDA graphs of whole ticks: inputs gathered, model called, step taken, with nothing to launch.

What differs from tick to tick is in static tensors that are filled before a replay: which slots,
which lines of the plan table, guidance weights, noise and conditioning.  The latents need no copy,
because the graph gathers them from the engine's registers itself, and steps them there.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sidestep.runtime.engine_batch import conditioning_of
from sidestep.runtime.engine_check import check_output
from sidestep.runtime.engine_step import Taken, Tick
from sidestep.runtime.graphs_device import Graph, GraphDevice
from sidestep.runtime.graphs_layout import Layout
from sidestep.runtime.upload import write_

Model = Callable[[Tensor, Tensor, Any], Tensor]
"""``model(x, t, conditioning)`` of a batch's ``[N, *shape]``, ``[N]`` and conditioning."""
Call = Callable[[Tensor, Tensor, Any, int], Tensor]
"""The same at step j of a chain: ``call(x, t, conditioning, j)``."""

_NOTHING: tuple[Callable[[], None], None] = (lambda: None, None)


class CaptureError(RuntimeError):
    """A tick could not be captured in a CUDA graph."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the model of a tick gets beside latents and times.

    Attributes:
        leaves: Of its conditioning, any nesting; they live no longer than the tick.
        spec: The nesting.
        static: Of each of the leaves, whether a graph has a tensor of its own for it, which is
            filled before a replay where the leaf is another object than the time before, or was
            written to since.
        key: Of all others, and of the call.
        call: What is captured, with those tensors in the place of the leaves. It is kept as long as
            the graph.
    """

    leaves: Sequence[Any]
    spec: TreeSpec
    static: Sequence[bool]
    key: Hashable
    call: Call


Prepare = Callable[[Tick, Layout, int], Inputs]
"""What m steps of a tick in one go get, laid out so."""


def requested(model: Model) -> Prepare:
    """The conditioning of the requests themselves, which tells nothing apart but entries."""

    def call(x: Tensor, t: Tensor, conditioning: Any, j: int) -> Tensor:
        return model(x, t, conditioning)

    def prepare(tick: Tick, layout: Layout, steps: int) -> Inputs:
        of_first = tick.rows[0].live.conditioning
        leaves, spec = tree_flatten(conditioning_of(layout.members, layout.branches))
        return Inputs(leaves, spec, of_first.by_entry, of_first.key, call)

    return prepare


@dataclass(frozen=True, kw_only=True)
class TickKey:
    """What a graph cannot change; ticks that agree in all of it replay the same one.

    Attributes:
        device: Of everything.
        dtype: Of the model's inputs and outputs.
        shape: Of one latent.
        entries: N, the size of the model call: one of the engine's buckets.
        rows: P, the most rows that may be in it.
        branches: G of the rows with the most.
        steps: m, taken in one go.
        noise: Whether some row draws any.
        inputs: Of the model call: what it is, and all of its inputs that are not in static tensors.
        tensors: Shape, strides, dtype and device of those that are.
        autocast: Its dtype, None where it is off.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    entries: int
    rows: int
    branches: int
    steps: int
    noise: bool
    inputs: Hashable
    tensors: tuple[Hashable, ...]
    autocast: torch.dtype | None


class TickProgram:
    """The static tensors of one key, and the program on them that is captured.

    Attributes:
        key: What it is for.
        graph: None until it is captured.
        warm: Whether it has been run.
        stage: What it was doing last, for the message of a capture that fails.
        begun: Whether registers have been written since `run` began.
        outputs: G of ``[P, D]`` model dtype, after it has run: valid until the next graph runs.
        conditioning: What the model gets, its tensors static where they may be others next time.
        weights: ``[m, P, G]`` fp32.
        noise: ``[P, D]`` fp32, or None.
        numbers: int64: slots ``[P]``, lines of the plan table ``[m, P]``, for each entry its row
            ``[N]``, and for each branch and row its entry ``[G, P]``.
    """

    def __init__(self, key: TickKey, inputs: Inputs, tick: Tick) -> None:
        """Allocates them; what is in them is of no meaning yet."""
        self.key, self._call, self._state = key, inputs.call, tick.state
        self.graph: Graph | None = None
        self.warm, self.begun, self.stage = False, False, ""
        self.outputs: list[Tensor] = []
        N, P, G, m = key.entries, key.rows, key.branches, key.steps
        self._leaves = [*inputs.leaves]
        self._static = [i for i, static in enumerate(inputs.static) if static]
        self._loaded: dict[int, tuple[weakref.ref[Tensor], int | None]] = {}
        with torch.inference_mode(False):  # written to in either mode
            fp32: dict[str, Any] = {"dtype": torch.float32, "device": key.device}
            self.numbers = torch.zeros(P + m * P + N + G * P, dtype=torch.int64, device=key.device)
            self.weights = torch.zeros(m, P, G, **fp32)
            self.noise = torch.zeros(P, tick.state.size, **fp32) if key.noise else None
            for i in self._static:
                self._leaves[i] = torch.empty_like(inputs.leaves[i])  # dense where it is expanded
        self.conditioning = tree_unflatten(self._leaves, inputs.spec)
        slots, lines, self._entries, places = self.numbers.split([P, m * P, N, G * P])
        self._slots, self._lines, self._places = slots, lines.view(m, P), places.view(G, P)

    def load(self, tick: Tick, layout: Layout, inputs: Inputs) -> None:
        """Writes what this tick needs into the static tensors."""
        P, m = self.key.rows, self.key.steps
        write_(self.numbers, layout.numbers(tick, P, m))
        write_(self.weights, layout.weights(tick, P, m))
        if self.noise is not None:
            torch.stack(tick.state.drawn(tick.noise), out=self.noise[: len(tick.rows)])
        for i in self._static:
            leaf, (loaded, version) = inputs.leaves[i], self._loaded.get(i, _NOTHING)
            now = None if leaf.is_inference() else leaf._version
            if loaded() is not leaf or now is None or version != now:
                self._leaves[i].copy_(leaf)
                self._loaded[i] = weakref.ref(leaf), now

    def run(self) -> None:
        """m ticks; nothing in here may ask the host, or be told by it."""
        key, state, slots = self.key, self._state, self._slots
        self.begun = False
        for j, (lines, weights) in enumerate(zip(self._lines, self.weights, strict=True)):
            self.stage = "the gather of the model's inputs"
            x, t = state.read(lines[self._entries], slots[self._entries])
            self.stage = "the model call"
            output = self._call(x, t, self.conditioning, j)
            check_output(output, key.entries, key.shape, key.dtype, key.device)
            self.stage = "solver_step"
            flat = output.detach().reshape(key.entries, state.size)
            self.outputs = [flat.index_select(0, places) for places in self._places]
            self.begun = True
            state.write(self.outputs, weights, self.noise, lines, slots)
        self.stage = "the end"


class TickGraphs:
    """The graphs of one engine: takes ticks for `Engine.tick`.

    The first tick of a key runs as it is, which warms up all kernels; the second is captured and
    replayed, as are all that follow.

    Attributes:
        captured: Captures so far.
        replayed: Replays so far.
        failure: Of a tick's capture, which was then run as it is, until somebody takes it.
    """

    def __init__(self, device: GraphDevice, *, kept: int, chain: int) -> None:
        """Knows no key.

        Args:
            device: What captures.
            kept: Keys that are remembered, the latest ones.
            chain: Most steps that are taken in one go.
        """
        self._device, self._kept, self._chain = device, kept, chain
        self._programs: OrderedDict[TickKey, TickProgram] = OrderedDict()
        self._last: TickProgram | None = None
        self.captured = self.replayed = 0
        self.failure: CaptureError | None = None

    @property
    def begun(self) -> bool:
        """Whether the tick that was broken off has changed registers."""
        return self._last is not None and self._last.begun

    def __len__(self) -> int:
        """Keys that are remembered."""
        return len(self._programs)

    def take(self, tick: Tick, prepare: Prepare) -> Taken:
        """Makes the model call of some rows and takes their step, or several."""
        self._last, layout = None, Layout(tick)
        steps = 1 << (min(tick.foreseen, self._chain).bit_length() - 1)  # few sizes to capture
        inputs = prepare(tick, layout, steps)
        program = self._program(tick, layout, steps, inputs)
        program.load(tick, layout, inputs)
        self._last = program
        if program.warm and program.graph is None:
            self._capture(program)
        if program.graph is None:
            self._device.warm_up(program.run)
            program.warm = True
        else:
            program.graph.replay()
            self.replayed += 1
        n, m = len(tick.rows), program.key.steps
        outputs = [u[:n] for u in program.outputs] if m == 1 else []
        return Taken(tick.rows, outputs, program.weights[0, :n], tick.state.stats(n), m)

    def forget(self) -> None:
        """Lets go of all graphs."""
        if self._programs:
            self._device.synchronize()
        self._programs.clear()
        self._last = None

    def _program(self, tick: Tick, layout: Layout, steps: int, inputs: Inputs) -> TickProgram:
        state, kind = tick.state, tick.state.device.type
        leaves = zip(inputs.leaves, inputs.static, strict=True)
        key = TickKey(
            device=state.device,
            dtype=state.dtype,
            shape=state.shape,
            entries=tick.entries,
            rows=layout.most,
            branches=len(layout.starts),
            steps=steps,
            noise=any(z is not None for z in tick.noise),
            inputs=inputs.key,
            tensors=tuple(
                (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
                for leaf, static in leaves
                if static
            ),
            autocast=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        )
        if key not in self._programs:
            self._programs[key] = TickProgram(key, inputs, tick)
            if len(self._programs) > self._kept:
                self._device.synchronize()  # it may still run
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key]

    def _capture(self, program: TickProgram) -> None:
        program.stage = "the beginning"
        try:
            program.graph = self._device.capture(program.run)
            self.captured += 1
        except Exception as error:
            reason = (str(error).splitlines() or [repr(error)])[0]  # CUDA's go on for a paragraph
            self.failure = CaptureError(
                f"capturing a tick in a CUDA graph failed at {program.stage}: {reason}"
            )
            self.failure.__cause__ = error
