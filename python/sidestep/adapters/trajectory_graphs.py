"""CUDA graphs of a pipeline's model calls, from one generation to the next.

An engine and its graphs stay while everything that they go by does: the sizes, and the state of the
pipeline's networks (`sidestep.runtime.graphs_model`).  Prompts, images and times are inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sidestep.adapters.capture import network_of
from sidestep.kernels import config
from sidestep.runtime.denoisers import FromHelper, RecordedArguments, RecordedDenoiser
from sidestep.runtime.engine import Engine, Request, Result
from sidestep.runtime.engine_conditioning import is_value
from sidestep.runtime.graphs import CaptureError, TickGraphs
from sidestep.runtime.graphs_device import CudaGraphs, Graph, GraphDevice
from sidestep.runtime.graphs_model import State, difference, obstacle, settings, state_of
from sidestep.runtime.graphs_recorded import RecordedTicks

CHOICES = ("auto", "on", "off")
_CHAIN = 4  # steps in one graph where the host has nothing to decide, at most
_KEPT = 32  # graphs


def sizes(branches: int, capacity: int) -> list[int]:
    """Sizes of a model call from a graph, in entries: two to the octave, for little padding."""
    rows, all_rows = 1, {capacity}
    while rows < capacity:
        all_rows |= {rows} | ({rows * 3 // 2} if rows > 1 and rows * 3 // 2 < capacity else set())
        rows *= 2
    return [branches * size for size in sorted(all_rows)]


@dataclass
class _Failure:
    """What could not be captured.

    Attributes:
        key: Of the generation.
        state: Of its networks.
        reason: Why not.
        pause: Generations without graphs before the next try; None for ever.
        left: Of them.
    """

    key: Hashable
    state: State
    reason: str
    pause: int | None
    left: int = 0

    def of(self, key: Hashable, state: State) -> bool:
        """Whether it says something of a generation."""
        return (self.key, self.state) == (key, state)


class PipelineGraphs:
    """The engine of the last generation, and its graphs.

    Attributes:
        setting: "auto" launches operator by operator where there can be no graphs, and the summary
            says why; "on" raises in its place; "off".
        device: What captures; None for CUDA.
    """

    def __init__(self, setting: str = "auto", device: GraphDevice | None = None) -> None:
        """Captures nothing yet.

        Raises:
            ValueError: There is no such setting.
        """
        if setting not in CHOICES:
            raise ValueError(f"enable: graphs is {setting!r}, expected 'auto', 'on' or 'off'")
        self.setting, self.device = setting, device
        self._key: Hashable = None
        self._engine: Engine | None = None
        self._graphs: TickGraphs | None = None
        self._state: State = {}
        self._failed: _Failure | None = None

    def forget(self) -> None:
        """Lets go of all graphs, and of the engine."""
        if self._graphs is not None:
            self._graphs.forget()
        self._key = self._engine = self._graphs = self._failed = None
        self._state = {}

    def run(
        self, request: Request, denoiser: RecordedDenoiser, branches: int, sizing: dict[str, Any]
    ) -> tuple[Result, str]:
        """Runs a trajectory.

        Args:
            request: The trajectory.
            denoiser: Its model calls.
            branches: G.
            sizing: Arguments of the engine.

        Returns:
            What became of it, and what the summary says of graphs; nothing where they are off.

        Raises:
            CaptureError: They are on, and something could not be captured.
            ValueError: They are on where there can be none.
        """
        device, networks, reason = request.x.device, _networks(denoiser), ""
        there = self._there(device)
        if there:
            reason = _reason_against(denoiser, networks) or self._begin(networks, sizing)
        if reason or not there:
            said = self.without(device, reason)
            return _run(Engine(**sizing), request, RecordedTicks(denoiser, branches)), said
        assert self._engine is not None and self._graphs is not None
        engine, graphs = self._engine, self._graphs
        captured, replayed = graphs.captured, graphs.replayed
        ticks = RecordedTicks(denoiser, branches, sizes(branches, engine.capacity), graphs)
        try:
            result = _run(engine, request, ticks)
        except BaseException:
            self.forget()  # whatever it was in the middle of
            raise
        said = f"{graphs.captured - captured} captured, {graphs.replayed - replayed} replayed"
        self._failed = self._failure(ticks) if ticks.reason else None
        if ticks.reason:
            without = self.without(device, ticks.reason)
            said = without if said.startswith("0 captured, 0") else f"{said}, then {without}"
        return result, said

    def _failure(self, ticks: RecordedTicks) -> _Failure:
        """What is remembered of it: lack of memory for 1 generation, then 2, 4, and so on."""
        pause, last = None, self._failed
        if ticks.cramped:
            pause = 2 * last.pause if last is not None and last.pause else 1
        return _Failure(self._key, self._state, ticks.reason, pause, pause or 0)

    def without(self, device: torch.device, reason: str) -> str:
        """What the summary says where there are none.

        Raises:
            CaptureError: They are on.
            ValueError: Likewise, where there can be none.
        """
        if not self._there(device):
            return ""
        if self.setting == "on":
            raise CaptureError(f"enable: graphs='on' and there are none: {reason}")
        return f"none: {reason}"

    def _there(self, device: torch.device) -> bool:
        there = self.device is not None or device.type == "cuda"
        if self.setting == "on" and not there:
            raise ValueError(
                f"enable: graphs='on' with a model on {device}, expected one on a CUDA device; "
                "'auto' runs without graphs elsewhere"
            )
        return there and self.setting != "off"

    def _begin(self, networks: Sequence[Any], sizing: dict[str, Any]) -> str:
        """The engine and the graphs for what comes; why there are none, if so."""
        key, state = tuple(sizing.items()), _state(networks)
        failed = self._failed
        if failed is not None and failed.of(key, state) and (failed.left or failed.pause is None):
            failed.left -= 1
            return failed.reason
        if key != self._key or difference(self._state, state) is not None:
            self.forget()
            device = self.device or CudaGraphs(sizing["device"])
            self._engine = Engine(**sizing)
            guarded = _Guarded(device, state, lambda: _state(networks))
            self._graphs = TickGraphs(guarded, kept=_KEPT, chain=_CHAIN)
            self._key, self._state = key, state
        return ""


class _Guarded:
    """Captures nothing of networks that are not what they were when the generation began."""

    def __init__(self, device: GraphDevice, state: State, look: Callable[[], State]) -> None:
        self._device, self._state, self._look = device, state, look
        self.warm_up, self.synchronize = device.warm_up, device.synchronize

    def capture(self, call: Callable[[], None]) -> Graph:
        """See `GraphDevice`."""
        changed = difference(self._state, self._look())
        if changed is not None:
            raise RuntimeError(f"{changed} changes as the model is called")
        return self._device.capture(call)


def _run(engine: Engine, request: Request, ticks: RecordedTicks) -> Result:
    engine.submit(request)
    while engine.tick(ticks):
        pass
    (result,) = engine.results()
    return result


def _arguments(denoiser: RecordedDenoiser) -> list[RecordedArguments]:
    """Of all calls, those of helpers too, each once."""
    made = [m for step in denoiser.steps for call in step.calls for m in (call, *call.helpers)]
    return list({id(call.arguments): call.arguments for call in made}.values())


def _networks(denoiser: RecordedDenoiser) -> list[Any]:
    """All that the steps call, each once."""
    found = [network_of(arguments.model) for arguments in _arguments(denoiser)]
    return list({id(network): network for network in found}.values())


def _reason_against(denoiser: RecordedDenoiser, networks: Sequence[Any]) -> str:
    """Why nothing is captured; empty where nothing speaks against it."""
    if config.backend() == "reference":
        return "the reference backend of the kernels reads coefficients on the host"
    if denoiser.drafting is not None:
        return "rows leave the model early, and what is left of its batch is known on the host"
    if denoiser.mixes is not None:
        return "the guidance is combined element by element, or has more than three branches"
    for arguments in _arguments(denoiser):
        if arguments.whole:
            return "the model is compiled, and its guards run on the host"
        for leaf in tree_leaves((arguments.args, arguments.kwargs)):
            if not (isinstance(leaf, Tensor | FromHelper) or is_value(leaf)):
                kind = type(leaf).__name__
                return f"an argument of the model holds a {kind}, which a replay does not read"
    return next(filter(None, map(obstacle, networks)), "")


def _state(networks: Sequence[Any]) -> State:
    state = settings()
    for i, network in enumerate(networks):
        name = f"{type(network).__name__}" + (f" {i}" if i else "")
        state[f"{name} (which)"] = id(network)
        state |= {f"{name}.{path}": value for path, value in state_of(network).items()}
    return state
