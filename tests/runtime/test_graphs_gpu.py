"""CUDA graphs of the engine's ticks on a GPU: the real thing, beside the engine without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import SHAPE, conditioning, latents, network, plan_of, requests, run
from graph_recorder import Model, assert_same
from torch import Tensor

from sidestep.runtime.engine import Engine, Request, Result
from sidestep.runtime.engine_loop import EngineLoop
from sidestep.runtime.graphs import CaptureError
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.srds import SRDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
METHODS = (None, Adaptive(mode="paper", threshold=0.3), SRDS(blocks=3, tolerance=1e-3))


def there(request: Request) -> Request:
    """The same on the GPU; its noise is taken there by the engine."""
    given = {"shift": request.conditioning["shift"].cuda()}
    return replace(request, x=request.x.cuda(), conditioning=given)


def in_order(engine: Engine, ids: list[int]) -> list[Result]:
    results = {result.id: result for result in engine.results()}
    return [results[id] for id in ids]


def both(made: list[Request], **settings: Any) -> tuple[list[Result], list[Result], EngineLoop]:
    """With graphs, and without."""
    engines = [Engine(SHAPE, device="cuda", **settings) for _ in range(2)]
    ids = [[engine.submit(there(request)) for request in made] for engine in engines]
    around = EngineLoop(engines[0], Model())  # "auto"
    around.run()
    without = run(engines[1])
    return in_order(engines[0], ids[0]), [without[id] for id in ids[1]], around


@pytest.mark.parametrize("method", METHODS, ids=["serial", "adaptive", "srds"])
def test_equal_to_the_engine_without(method: Any) -> None:
    """The network is element by element, so that its bits do not depend on the call."""
    made = requests(12, methods=(method,))
    with_graphs, without, around = both(made, capacity=16, buckets=(1, 2, 4, 8, 16))
    assert_same(with_graphs, without)
    assert around.counts["replayed"] > around.counts["captured"] > 0


def test_matrix_products_and_chains() -> None:
    """Libraries with workspaces of their own; the size of the call is the same in all of them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(15, 15, generator=generator).cuda() / 4
    calls = 0

    def model(x: Tensor, t: Tensor, given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return (x.flatten(1) @ weight).tanh().view_as(x) + network(x, t, given["shift"])

    plan, results = plan_of("dpmsolver++2m", 24), []
    made = [
        there(Request(plan, latents(i, 2), conditioning(i, 2, 2), guidance=(-1.0, 2.0)))
        for i in range(2)
    ]
    for graphs, chain in (("off", 1), ("on", 1), ("on", 4)):
        engine = Engine(SHAPE, capacity=4, buckets=(8,), device="cuda")
        ids = [engine.submit(request) for request in made]
        around, calls = EngineLoop(engine, model, graphs=graphs, chain=chain), 0
        around.run()
        results.append(in_order(engine, ids))
        if graphs == "on":
            assert around.counts == {"captured": 1, "replayed": 24 // chain - 1, "kept": 1}
            assert calls == 2 * chain
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_workspaces_of_libraries_belong_to_the_graphs() -> None:
    """They can be let go of at any time, as `torch.compile` does."""
    weight = torch.randn(15, 15, generator=torch.Generator().manual_seed(0)).cuda() / 4

    def model(x: Tensor, t: Tensor, given: Any) -> Tensor:
        return (x.flatten(1) @ weight).tanh().view_as(x)

    results = []
    request = there(Request(plan_of("ddim", 12), latents(0, 4), conditioning(0, 4, 1)))
    for graphs in ("off", "on"):
        engine = Engine(SHAPE, capacity=4, buckets=(4,), device="cuda")
        engine.submit(request)
        around = EngineLoop(engine, model, graphs=graphs, chain=1)
        while around.tick():
            torch._C._cuda_clearCublasWorkspaces()
            taken = [torch.full((n,), torch.nan, device="cuda") for n in (1 << 20, 1 << 23)]
            for tensor in taken:
                assert bool(tensor.isnan().all())
        results.append(engine.results())
    assert_same(results[1], results[0])


def test_a_replay_allocates_no_more_than_its_conditioning() -> None:
    engine = Engine(SHAPE, capacity=4, buckets=(4,), device="cuda")
    around = EngineLoop(engine, Model(), graphs="on", chain=1)
    request = there(Request(plan_of("ddim", 12), latents(0, 4), conditioning(0, 4, 1)))
    engine.submit(request)
    for _ in range(3):
        around.tick()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        around.tick()
    torch.cuda.synchronize()
    made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    assert made == 5  # the gathered conditioning of each tick, a single tensor


def test_a_capture_that_fails_leaves_the_device_as_it_was() -> None:
    engine, stream = Engine(SHAPE, device="cuda"), torch.cuda.current_stream()

    def model(x: Tensor, t: Tensor, given: Any) -> Tensor:
        return network(x, t, given["shift"]) * float(t.sum().item() >= 0)

    request = there(Request(plan_of("ddim", 9), latents(0, 2), conditioning(0, 2, 1)))
    engine.submit(request)
    with pytest.raises(CaptureError, match=r"at the model call: .*; graphs=.off. runs without"):
        EngineLoop(engine, model, graphs="on", chain=1).run()
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    around = EngineLoop(engine, Model(), graphs="on", chain=1)  # others can still be captured
    around.run()
    (result,) = engine.results()
    without = Engine(SHAPE, device="cuda")
    without.submit(request)
    (expected,) = run(without).values()
    assert torch.equal(result.x, expected.x)
    assert around.counts["captured"] == 1


def test_graphs_come_and_go() -> None:
    """The pool outlives the graphs that used it."""
    engine = Engine(SHAPE, capacity=4, buckets=(1, 2, 4), device="cuda")
    around = EngineLoop(engine, Model(), graphs="on", chain=1, kept=1)
    without = Engine(SHAPE, capacity=4, buckets=(1, 2, 4), device="cuda")
    for turn, rows in enumerate((1, 4, 2, 1, 4)):
        request = there(
            Request(plan_of("ddim", 4), latents(turn, rows), conditioning(turn, rows, 1))
        )
        engine.submit(request)
        without.submit(request)
        around.run()
        (expected,) = run(without).values()
        assert torch.equal(engine.results()[0].x, expected.x)
        assert around.counts["kept"] == 1 and around.counts["captured"] == turn + 1
        if turn == 3:
            around.forget()


def test_autocast_ends_between_the_replays() -> None:
    """It forgets its casts of the weights then; a graph has to make its own."""
    layer = torch.nn.Linear(15, 15, device="cuda")

    def model(x: Tensor, t: Tensor, given: Any) -> Tensor:
        return layer(x.flatten(1)).float().view_as(x)

    results = []
    request = there(Request(plan_of("ddim", 12), latents(0, 2), conditioning(0, 2, 1)))
    for graphs in ("off", "on"):
        engine = Engine(SHAPE, buckets=(2,), device="cuda")
        engine.submit(request)
        around, went_on = EngineLoop(engine, model, graphs=graphs, chain=1), True
        while went_on:
            with torch.autocast("cuda", torch.bfloat16):
                went_on = around.tick()
            # takes the place of whatever was freed
            others = [torch.full((n,), torch.nan, device="cuda") for n in (64, 128, 1024)]
        assert len(others) == 3 and around.counts["captured"] == (graphs == "on")
        results.append(engine.results())
    assert_same(results[1], results[0])
