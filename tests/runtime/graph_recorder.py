"""A CUDA graph without CUDA: records the operators of a call, and runs them on the same tensors.

As on a GPU, capturing does nothing but write down (what it wrote to is put back, and what it made
is poisoned), a replay runs no Python of the caller, and what would wait for the device is refused.
All graphs share one memory pool: a replay poisons what the others have made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from engine_cases import network, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sidestep.runtime.engine import Engine, Request, Result
from sidestep.runtime.engine_loop import EngineLoop

aten = torch.ops.aten
REFUSED = (aten._local_scalar_dense.default, aten.nonzero.default, aten.lift_fresh.default)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """The operators of one capture."""

    def __init__(self, pool: list[Recording]) -> None:
        super().__init__()
        self.pool = pool
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []  # made: tensors of its own
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in REFUSED:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.before += [(t, t.clone()) for t in tensors(value)]
        output = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        made = [t for t in tensors(output) if t.untyped_storage()._cdata not in given]
        if made or func._schema.is_mutable:  # a view is there already
            self.steps.append((func, args, kwargs, made))
        return output

    def undo(self) -> None:
        for tensor, was in reversed(self.before):
            tensor.copy_(was)
        self.poison()

    def poison(self) -> None:
        for *_, made in self.steps:
            for tensor in made:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)

    def replay(self) -> None:
        for other in self.pool:
            if other is not self:
                other.poison()
        for func, args, kwargs, made in self.steps:
            output = func(*args, **kwargs)
            for static, now in zip(made, tensors(output), strict=False):
                static.copy_(now)


class Recorder:
    """A `GraphDevice` on the CPU, which counts what it is asked for."""

    def __init__(self) -> None:
        self.warmed: list[Any] = []
        self.captured: list[Any] = []  # the programs
        self.pool: list[Recording] = []
        self.synchronized = 0

    def warm_up(self, call: Callable[[], None]) -> None:
        self.warmed.append(call.__self__)  # type: ignore[attr-defined]
        call()

    def capture(self, call: Callable[[], None]) -> Recording:
        program = call.__self__  # type: ignore[attr-defined]
        assert any(program is warm for warm in self.warmed)
        recording = Recording(self.pool)
        try:
            with recording:
                call()
        finally:
            recording.undo()
        self.captured.append(program)
        self.pool.append(recording)
        return recording

    def synchronize(self) -> None:
        self.synchronized += 1


class Model:
    """The network of the cases, counting the calls that are made from Python."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor, given: Any) -> Tensor:
        self.calls += 1
        return network(x, t, given["shift"])


def graphed(
    engine: Engine, made: list[Request], model: Any = None, **settings: Any
) -> tuple[list[Result], EngineLoop, Recorder]:
    """The results of these requests, in order, through recorded graphs."""
    recorder = Recorder()
    around = EngineLoop(engine, model or Model(), **{"graphs": "on", "device": recorder} | settings)
    ids = [engine.submit(request) for request in made]
    around.run()
    results = {result.id: result for result in engine.results()}
    return [results[id] for id in ids], around, recorder


def assert_same(results: list[Result], expected: list[Result]) -> None:
    """Bit for bit, with the same decisions and the same cost."""
    for result, other in zip(results, expected, strict=True):
        assert (result.status, result.error) == ("done", None)
        assert torch.equal(result.x, other.x)
        assert repr(result.summary) == repr(other.summary)


def eager(engine: Engine, made: list[Request]) -> list[Result]:
    ids = [engine.submit(request) for request in made]
    results = run(engine)
    return [results[id] for id in ids]
