"""The engine's memory: known at the beginning, and the same after any number of ticks."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from engine_cases import conditioning, latents, model, plan_of, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sidestep.runtime.engine import Engine, Request
from sidestep.runtime.methods.adaptive import Adaptive

SHAPE = (4, 16, 16)
PAPER = Adaptive(mode="paper", threshold=0.3)
EXTRAPOLATED = Adaptive(mode="third-difference", threshold=0.3, reuse="linear", warm_up=3)


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that were made inside and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if is_tensor(leaf)}
        for leaf in tree_leaves(output):
            if is_tensor(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known | given:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def gone(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


def made(method: Any, branches: int) -> Request:
    guidance = (1.0,) if branches == 1 else (-1.0, 2.0)
    plan = plan_of("dpmsolver++2m", 7)
    return Request(plan, latents(1, 2, SHAPE), conditioning(1, 2, branches), guidance, method)


def test_all_state_is_there_from_the_beginning() -> None:
    engine = Engine(SHAPE, capacity=5, registers=3, history=2, branches=2, table_steps=100)
    D = 4 * 16 * 16
    state = 5 * 3 * D * 4 + 5 * 2 * 2 * D * 4
    table = 101 * ((4 * 5 + 1) * 4 + 2 * 4)
    assert engine.memory_bytes == state + table + D * 4 + 5 * 2 * 4
    half = Engine(SHAPE, capacity=5, registers=3, history=2, table_steps=100, dtype=torch.float16)
    assert engine.memory_bytes - half.memory_bytes == 5 * 2 * 2 * D * 2


@pytest.mark.parametrize("method", [None, PAPER, EXTRAPOLATED], ids=["serial", "paper", "linear"])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow(method: Any, branches: int, dtype: torch.dtype) -> None:
    engine = Engine(SHAPE, capacity=6, buckets=(4, 12), dtype=dtype)
    requests = [made(method, branches) for _ in range(4)]
    most, after = [], []
    for _ in range(2):
        with Meter() as meter:
            most.append(0)
            for request in requests:
                engine.submit(request)
            while True:
                before = meter.peak = meter.now
                batch = engine.next()
                if batch is None:
                    break
                gathered = meter.peak - before
                output = model(batch).to(dtype)
                before = meter.peak = meter.now
                engine.complete(batch, output)
                # what is new and stays are the results of requests that are done
                transient = meter.peak - max(before, meter.now)
                most[-1] = max(most[-1], gathered + transient)
                del batch, output
            results = engine.results()
            assert {result.status for result in results} == {"done"}
            del results
            gc.collect()
            after.append(meter.now)
    assert 0 < most[0] == most[1] <= engine.tick_bytes
    assert after == [0, 0]


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({}, 2), ({"mode": "error-control"}, 2), ({"mode": "error-control", "reuse": "hold"}, 1),
        ({"mode": "error-control", "reuse": "quadratic"}, 3), ({"mode": "elementwise"}, 2),
        ({"mode": "features"}, 1), ({"mode": "paper"}, 0), ({"mode": "third-difference"}, 0),
        ({"mode": "windowed"}, 0), ({"mode": "entropy"}, 0),
        ({"mode": "entropy", "reuse": "damped"}, 2), ({"mode": "features", "reuse": "damped"}, 3),
        ({"mode": "elementwise", "reuse": "damped"}, 4),
    ],
)  # fmt: skip
def test_what_a_criterion_keeps(settings: dict[str, Any], kept: int) -> None:
    """So many fp32 latents a row, as docs/engine.md says, and a few numbers."""
    rows, latent = 4, 4 * math.prod(SHAPE)
    engine = Engine(SHAPE, capacity=rows, buckets=(rows,))
    plan, method = plan_of("dpmsolver++2m", 12), Adaptive(**{"threshold": 0.0, **settings})
    with Meter() as meter:
        engine.submit(
            Request(plan, latents(1, rows, SHAPE), conditioning(1, rows, 1), (1.0,), method)
        )
        before, most = meter.now, 0
        for _ in range(len(plan) - 1):
            batch = engine.next()
            assert batch is not None
            output = model(batch)
            engine.complete(batch, output)
            del batch, output
            most = max(most, meter.now - before)
    assert kept * rows * latent <= most < kept * rows * latent + rows * 4096


def test_nothing_is_held_for_requests_that_have_ended() -> None:
    engine = Engine(SHAPE, capacity=2)
    x = latents(1, 2, SHAPE)
    gone = weakref.ref(x)
    engine.submit(Request(plan_of("ddim", 3), x, conditioning(1, 2, 1), method=PAPER))
    del x
    assert len(run(engine)) == 1
    engine.submit(Request(plan_of("ddim", 3), latents(2, 2, SHAPE), method=PAPER))
    engine.cancel(1)
    gc.collect()
    assert gone() is None
    assert not engine._live and not engine._groups._known
    assert not any(engine._slots._rows) and not engine._slots._waiting


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: single values, and copies to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_cpu = "device" in (kwargs or {}) and func is torch.ops.aten._to_copy.default
        self.count += to_cpu or func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_back_once_and_only_for_adaptive_rows() -> None:
    never = Adaptive(mode="paper", threshold=0.0)  # so that all rows stay together
    for method, expected in ((None, [0] * 7), (never, [1] * 6 + [0])):  # 7 steps, 6 decisions
        engine = Engine(SHAPE, capacity=6, buckets=(12,))
        for _ in range(3):
            engine.submit(made(method, 2))
        reads = []
        with Reads() as mode:
            while (batch := engine.next()) is not None:
                assert mode.count == sum(reads)
                engine.complete(batch, model(batch))
                reads.append(mode.count - sum(reads))
        assert reads == expected
