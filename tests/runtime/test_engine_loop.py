"""The loop with graphs: what is captured anew, what is let go, what fails and who notices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import SHAPE, conditioning, latents, loop, network, plan_of, requests, run
from graph_recorder import Model, Recorder, assert_same, eager, graphed
from torch import Tensor

import sidestep
from sidestep.runtime.engine import Engine, Request
from sidestep.runtime.engine_loop import EngineLoop
from sidestep.runtime.engine_rows import Live
from sidestep.runtime.graphs import CaptureError
from sidestep.runtime.methods.adaptive import Adaptive

PAPER = Adaptive(mode="paper", threshold=0.3)


def test_other_conditioning_is_another_graph() -> None:
    plan = plan_of("ddim", 3)
    held = object()
    wide, deep = torch.arange(6.0).view(2, 3), torch.arange(24.0).view(2, 3, 2, 2)
    kinds: list[Any] = [
        {"shift": torch.ones(2)},
        {"shift": torch.ones(2).double()},
        {"shift": torch.ones(2, 1)},
        {"shift": torch.ones(2), "more": wide},
        {"shift": torch.ones(2), "more": torch.zeros(2, 4)},
        {"shift": torch.ones(2), "more": deep},
        {"shift": torch.ones(2), "more": deep.to(memory_format=torch.channels_last)},
        {"shift": torch.ones(2), "more": 1},
        {"shift": torch.ones(2), "more": 2},
        {"shift": torch.ones(2), "more": held},
    ]
    engine, recorder = Engine(SHAPE), Recorder()
    around = EngineLoop(engine, Model64(), graphs="on", device=recorder, chain=1)
    for count, kind in enumerate(kinds, start=1):
        for _ in range(2):
            request = Request(plan, latents(count, 2), kind)
            engine.submit(request)
            around.run()
            (result,) = engine.results()
            assert torch.equal(result.x, solo_of(request)), kind
        assert around.counts["captured"] == around.counts["kept"] == count
    assert around.counts["replayed"] == len(kinds) * (2 * 3 - 1)
    assert len({program.key for program in recorder.captured}) == len(kinds)
    # an object that a graph knows by its address stays alive as long as the graph
    assert recorder.captured[-1].conditioning["more"] is held


class Model64:
    """Reads all of the conditioning."""

    def __call__(self, x: Tensor, t: Tensor, given: Any) -> Tensor:
        more = given.get("more", 0)
        if isinstance(more, Tensor):
            more = more.flatten(1).sum(1).view(-1, 1, 1) * 0.1
        elif not isinstance(more, int):
            more = 0.5
        return network(x, t, given["shift"].float()) + more


def solo_of(request: Request) -> Tensor:
    engine = Engine(SHAPE)
    engine.submit(request)
    model = Model64()
    (result,) = run(engine, lambda batch: model(batch.x, batch.t, batch.conditioning)).values()
    assert result.x is not None
    return result.x


@pytest.mark.parametrize("change", ["dtype", "shape", "autocast"])
def test_keys_of_other_engines_differ(change: str) -> None:
    def key(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Any:
        def model(x: Tensor, t: Tensor, given: Any) -> Tensor:
            return x * 0.5

        request = Request(plan_of("ddim", 2), latents(0, 1, shape))
        _, _, recorder = graphed(Engine(shape, dtype=dtype), [request], model, chain=1)
        (program,) = recorder.captured
        return program.key

    if change == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            other = key()
        assert other == replace(key(), autocast=torch.bfloat16) != key()
    elif change == "dtype":
        assert key(dtype=torch.float16) == replace(key(), dtype=torch.float16) != key()
    else:
        assert key(shape=(5, 3)) == replace(key(), shape=(5, 3)) != key()


def test_the_oldest_graphs_are_let_go() -> None:
    engine, recorder = Engine(SHAPE, capacity=4, buckets=(1, 2, 4)), Recorder()
    around = EngineLoop(engine, Model(), graphs="on", device=recorder, chain=1, kept=2)

    def serve(rows: int) -> None:
        request = Request(plan_of("ddim", 3), latents(rows, rows), conditioning(rows, rows, 1))
        engine.submit(request)
        around.run()
        assert torch.equal(engine.results()[0].x, loop(request))

    for rows, captured, waited in (
        (1, 1, 0),
        (2, 2, 0),
        (1, 2, 0),  # used again: now 2 is the oldest
        (4, 3, 1),
        (1, 3, 1),
        (2, 4, 2),  # anew
    ):
        serve(rows)
        assert (around.counts["captured"], recorder.synchronized) == (captured, waited)
        assert around.counts["kept"] <= 2
    around.forget()
    assert around.counts["kept"] == 0 and recorder.synchronized == 3
    serve(2)
    assert around.counts["captured"] == 5


def test_other_weights_need_forget() -> None:
    weight = {"now": torch.tensor(1.0)}
    engine = Engine(SHAPE)
    around = EngineLoop(
        engine, lambda x, t, given: x * weight["now"], graphs="on", device=Recorder(), chain=1
    )
    request = Request(plan_of("ddim", 3), latents(0, 1))

    def serve() -> Tensor:
        engine.submit(request)
        around.run()
        (result,) = engine.results()
        assert result.x is not None
        return result.x

    first = serve()
    weight["now"].fill_(2.0)  # in place: the graph reads it
    second = serve()
    assert not torch.equal(first, second)
    weight["now"] = torch.tensor(1.0)  # elsewhere: it does not
    assert torch.equal(serve(), second)
    around.forget()
    assert torch.equal(serve(), first)


@pytest.mark.parametrize(
    ("broken", "stage"),
    [
        (lambda x: x * float(x.abs().max().item() > 0), "the model call"),
        (lambda x: x * torch.tensor(1.0), "the model call"),
    ],
    ids=["item", "copy from the host"],
)
def test_a_capture_that_fails_says_so_and_loses_nothing(broken: Any, stage: str) -> None:
    def model(x: Tensor, t: Tensor, given: Any) -> Tensor:
        return broken(network(x, t, given["shift"]))

    made = requests(3, (None, PAPER))
    engine, recorder = Engine(SHAPE, capacity=8, buckets=(16,)), Recorder()
    ids = [engine.submit(request) for request in made]
    around = EngineLoop(engine, model, graphs="on", device=recorder)
    with pytest.raises(CaptureError) as caught:
        around.run()
    assert str(caught.value) == (
        f"EngineLoop: capturing a tick in a CUDA graph failed at {stage}: operation not permitted "
        'when stream is capturing; graphs="off" runs without'
    )
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert engine.counts()["in_flight"] == 0 and engine.counts()["running"] == 3
    with pytest.raises(CaptureError):  # again, after one tick more
        around.tick()
    assert around.counts["captured"] == 0
    EngineLoop(engine, model, graphs="off").run()
    assert not around.tick()  # there is nothing to do, and nothing more to say
    results = {result.id: result for result in engine.results()}
    without = Engine(SHAPE, capacity=8, buckets=(16,))
    assert_same([results[id] for id in ids], eager(without, made))


@pytest.mark.parametrize("stage", ["the beginning", "the end"])
def test_a_capture_may_fail_outside_of_the_tick(stage: str) -> None:
    class Broken(Recorder):
        def capture(self, call: Any) -> Any:
            if stage == "the end":
                super().capture(call)
            raise RuntimeError("unjoined work\nand a paragraph about it")

    engine = Engine(SHAPE)
    request = Request(plan_of("ddim", 3), latents(0, 1), conditioning(0, 1, 1))
    engine.submit(request)
    around = EngineLoop(engine, Model(), graphs="on", device=Broken(), chain=1)
    assert around.tick()
    for _ in range(2):
        with pytest.raises(CaptureError, match=f"at {stage}: unjoined work; graphs=.off. runs"):
            around.tick()
    assert torch.equal(engine.results()[0].x, loop(request))


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_what_the_model_raises_ends_its_requests(graphs: str) -> None:
    engine, calls = Engine(SHAPE, capacity=4, buckets=(4,)), 0

    def model(x: Tensor, t: Tensor, given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if given.get("kind") == 1:
            raise KeyError("boom")
        if given.get("kind") == 2:
            return x[:1]
        return network(x, t, given["shift"])

    plan = plan_of("ddim", 3)
    good = Request(plan, latents(0, 1), conditioning(0, 1, 1))
    made = [replace(good, conditioning={**good.conditioning, "kind": kind}) for kind in (1, 2)]
    ids = [engine.submit(request) for request in (good, *made)]
    EngineLoop(engine, model, graphs=graphs, device=Recorder()).run()
    results = {result.id: result for result in engine.results()}
    assert torch.equal(results[ids[0]].x, loop(good))
    errors = [results[id].error for id in ids[1:]]
    assert isinstance(errors[0], KeyError) and isinstance(errors[1], ValueError)
    assert "expected [4, 3, 5]" in str(errors[1])
    assert engine.counts()["free"] == 4 and calls > 0


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_ctrl_c_leaves_no_slot_behind(graphs: str) -> None:
    engine = Engine(SHAPE, capacity=2)

    def model(x: Tensor, t: Tensor, given: Any) -> Tensor:
        raise KeyboardInterrupt

    engine.submit(Request(plan_of("ddim", 3), latents(0, 2)))
    with pytest.raises(KeyboardInterrupt):
        EngineLoop(engine, model, graphs=graphs, device=Recorder()).run()
    (result,) = engine.results()
    assert result.status == "failed" and "KeyboardInterrupt" in str(result.error)
    assert engine.counts()["free"] == 2


def test_ctrl_c_in_a_chain_ends_what_is_ahead_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, count = Engine(SHAPE, capacity=2), Live.count_call
    around = EngineLoop(engine, Model(), graphs="on", device=Recorder(), chain=4)
    engine.submit(Request(plan_of("ddim", 8), latents(0, 1), conditioning(0, 1, 1)))

    def counting(live: Live, index: int, ticket: int) -> None:
        if len(live.tickets) == 2:  # two of the four steps are written down
            raise KeyboardInterrupt
        count(live, index, ticket)

    monkeypatch.setattr(Live, "count_call", counting)
    with pytest.raises(KeyboardInterrupt):
        around.tick()
    (result,) = engine.results()
    assert result.status == "failed" and "broken off" in str(result.error)
    assert engine.counts()["free"] == 2 and not around.tick()


def test_requests_that_end_or_come_while_the_loop_runs() -> None:
    engine = Engine(SHAPE, capacity=4, buckets=(4,))
    plan = plan_of("ddim", 6)
    doomed = engine.submit(Request(plan, latents(1, 1), conditioning(1, 1, 1)))
    late = Request(plan, latents(5, 1), conditioning(5, 1, 1))
    ids: list[int] = []

    def on_step(k: int, x: Tensor, rows: Any) -> None:
        if k == 2:
            assert engine.cancel(doomed)
            ids.append(engine.submit(late))

    first = Request(plan, latents(2, 1), conditioning(2, 1, 1), on_step=on_step)
    ids.append(engine.submit(first))
    around = EngineLoop(engine, Model(), graphs="on", device=Recorder())
    around.run()
    results = {result.id: result for result in engine.results()}
    assert results[doomed].status == "cancelled"
    for id, request in zip(ids, (first, late), strict=True):
        assert torch.equal(results[id].x, loop(request))
    assert around.counts["replayed"] > 0


def test_settings() -> None:
    engine = Engine(SHAPE)
    for bad, message in (
        ({"graphs": "yes"}, "graphs is 'yes', expected 'auto', 'on' or 'off'"),
        ({"graphs": "on"}, "graphs='on' with an engine on cpu, expected one on a CUDA device"),
        ({"chain": 0}, "chain is 0, expected 1 or more"),
        ({"kept": 0}, "kept is 0, expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=f"EngineLoop: {message}"):
            EngineLoop(engine, Model(), **bad)
    model = Model()
    around = sidestep.EngineLoop(engine, model)  # "auto", on the CPU: without
    made = requests(2)
    ids = [engine.submit(request) for request in made]
    around.run()
    around.forget()
    results = {result.id: result for result in engine.results()}
    assert all(
        torch.equal(results[id].x, loop(request)) for id, request in zip(ids, made, strict=True)
    )
    assert around.counts == {"captured": 0, "replayed": 0, "kept": 0} and model.calls > 0
