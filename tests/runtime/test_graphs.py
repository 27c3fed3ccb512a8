"""Ticks in graphs: on the CPU with recorded ones, bit for bit what the engine does without."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import SHAPE, conditioning, latents, loop, network, plan_of, requests, run, solo
from graph_recorder import Model, Recorder, assert_same, eager, graphed
from torch import Tensor

from sidestep.runtime.engine import Engine, Request
from sidestep.runtime.engine_loop import EngineLoop
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.srds import SRDS

PAPER = Adaptive(mode="paper", threshold=0.3)
EXTRAPOLATED = Adaptive(mode="third-difference", threshold=0.3, reuse="linear", warm_up=3)


@pytest.mark.parametrize("chain", [1, 4])
def test_serial_rows_at_different_steps(chain: int) -> None:
    made = requests(14)
    assert any(r.noise is not None for r in made) and {len(r.guidance) for r in made} == {1, 2}

    def engine() -> Engine:
        return Engine(SHAPE, capacity=7, buckets=(1, 2, 4, 8, 12))

    results, around, recorder = graphed(engine(), made, chain=chain)
    for result, request in zip(results, made, strict=True):
        assert torch.equal(result.x, loop(request))
    assert_same(results, eager(engine(), made))
    assert around.counts["captured"] == len(recorder.captured) >= 5
    assert around.counts["replayed"] > around.counts["captured"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [PAPER, EXTRAPOLATED], ids=["paper", "linear"])
def test_adaptive_rows_that_skip(method: Adaptive, dtype: torch.dtype) -> None:
    made = requests(12, methods=(method, None))

    def model(x: Tensor, t: Tensor, given: Any) -> Tensor:
        return network(x.float(), t, given["shift"]).to(dtype)

    def engine() -> Engine:
        return Engine(SHAPE, capacity=8, buckets=(2, 4, 8), dtype=dtype)

    results, around, _ = graphed(engine(), made, model)
    without = engine()
    ids = [without.submit(request) for request in made]
    expected = run(without, lambda batch: model(batch.x, batch.t, batch.conditioning))
    assert_same(results, [expected[id] for id in ids])
    adaptive = results[::2]
    assert any(not all(map(all, result.summary.skip_map)) for result in adaptive)
    assert around.counts["replayed"] > 10


@pytest.mark.parametrize(
    "method", [SRDS(blocks=3, tolerance=1e-3), SRDS(exact=True), SRDS(blocks=(0, 7, 11), width=2)]
)
@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++2m", "sde-dpmsolver++2m"])
def test_srds(solver: str, method: SRDS) -> None:
    plan = plan_of(solver, 11)
    noise = latents(9, 11 * plan.noise_columns * 2).view(11, -1, 2, *SHAPE)
    request = Request(
        plan,
        plan.initial_scale * latents(3, 2),
        conditioning(3, 2, 2),
        guidance=(-1.5, 2.5),
        method=method,
        noise=noise if plan.stochastic else None,
    )
    shown: list[tuple[int, Tensor]] = []
    listening = replace(request, on_step=lambda p, x, rows: shown.append((p, x.clone())))

    def engine() -> Engine:
        return Engine(SHAPE, capacity=16, buckets=(1, 2, 4, 8, 16, 32))

    results, around, recorder = graphed(engine(), [listening])
    chained = any(program.key.steps > 1 for program in recorder.captured)
    assert chained == (method.blocks == (0, 7, 11) and not plan.stochastic)  # long blocks
    seen, shown = shown, []
    listening = replace(request, on_step=lambda p, x, rows: shown.append((p, x.clone())))
    assert_same(results, eager(engine(), [listening]))
    assert [p for p, _ in seen] == [p for p, _ in shown]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, shown, strict=True))
    assert around.counts["replayed"] > 0


def test_requests_of_all_methods_together() -> None:
    made = requests(12, (SRDS(blocks=3, tolerance=1e-3), None, PAPER, SRDS(exact=True)))
    together, around, _ = graphed(Engine(SHAPE, capacity=24, buckets=(1, 2, 4, 8, 16, 32)), made)
    for result, request in zip(together, made, strict=True):
        alone = solo(request, capacity=24, buckets=range(1, 49))
        assert (result.status, result.error) == ("done", None)
        assert torch.equal(result.x, alone.x)
    assert around.counts["replayed"] > 0


@pytest.mark.parametrize("steps", [3, 8, 13])
@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++3s", "unipc2"])
def test_chained_steps_are_single_steps(solver: str, steps: int) -> None:
    plan = plan_of(solver, steps)
    guidance = [(1 - s, float(s)) for s in range(len(plan))]  # of each step its own
    made = [
        Request(plan, latents(i, 2), conditioning(i, 2, 2), guidance=guidance) for i in range(2)
    ]

    def engine() -> Engine:
        return Engine(SHAPE, capacity=5, buckets=(16,))

    one, single, _ = graphed(engine(), made, chain=1)
    ticks = Counter[int]()
    for chain in (2, 4, 64):
        model = Model()
        many, around, recorder = graphed(engine(), made, model, chain=chain)
        assert_same(many, one)
        taken = [program.key.steps for program in recorder.warmed]
        assert max(taken) == 1 << (min(chain, len(plan)).bit_length() - 1)
        ticks[chain] = len(taken) + around.counts["replayed"]
        # Python calls the model to warm up and to capture, never to replay
        assert model.calls == sum(taken) + sum(p.key.steps for p in recorder.captured)
    assert_same(one, eager(engine(), made))
    assert single.counts == {"captured": 1, "replayed": len(plan) - 1, "kept": 1}
    assert ticks[64] == len(plan).bit_count()
    assert len(plan) > ticks[2] >= ticks[4] >= ticks[64]


def test_nothing_is_chained_where_the_host_has_a_say() -> None:
    plan, heard = plan_of("ddim", 9), []
    serial = Request(plan, latents(0, 1), conditioning(0, 1, 1))
    listening = replace(serial, on_step=lambda k, x, rows: heard.append((k, x.clone())))
    stochastic = replace(
        serial,
        plan=plan_of("sde-dpmsolver++2m", 9),
        noise=latents(1, 9).view(9, 1, 1, *SHAPE),
    )
    other = replace(serial, conditioning={"shift": torch.zeros(1), "kind": 1})  # another call
    for made in ([listening], [stochastic], [replace(serial, method=PAPER)], [serial, other]):
        results, _, recorder = graphed(Engine(SHAPE, capacity=4), made, chain=8)
        assert_same(results, eager(Engine(SHAPE, capacity=4), made))
        assert {program.key.steps for program in recorder.warmed} == {1}
    first = heard[:9]
    assert [k for k, _ in first] == list(range(9))
    assert torch.equal(first[3][1], loop(replace(serial, plan=plan[:4])))


def test_one_capture_for_each_bucket_and_static_tensors() -> None:
    engine = Engine(SHAPE, capacity=16, buckets=(2, 8, 16))
    plan, recorder, model = plan_of("euler", 4), Recorder(), Model()
    around = EngineLoop(engine, model, graphs="on", device=recorder, chain=1)
    places: dict[int, list[int]] = {}
    for turn, rows in enumerate((1, 3, 2, 8, 5, 1, 4, 7)):  # entries: twice as many
        request = Request(
            plan, latents(turn, rows), conditioning(turn, rows, 2), guidance=(-1.0, 2.0)
        )
        id = engine.submit(request)
        around.run()
        (result,) = engine.results()
        assert result.id == id and torch.equal(result.x, loop(request))
        for program in recorder.captured:
            static = [program.numbers, program.weights, program.conditioning["shift"]]
            static += program.outputs
            now = [tensor.data_ptr() for tensor in static]
            assert places.setdefault(program.key.entries, now) == now
    assert [program.key.entries for program in recorder.captured] == [2, 8, 16]
    assert [program.key.rows for program in recorder.captured] == [1, 4, 8]
    assert around.counts == {"captured": 3, "replayed": 8 * 4 - 3, "kept": 3}
    assert model.calls == 2 * 3  # each once to warm up and once to be captured


def id_of(program: Any) -> int:
    return int(program.key.entries)


def test_rows_that_are_not_there_leave_their_slots_alone() -> None:
    """A graph has room for more rows: until they come, their slots belong to others."""
    engine = Engine(SHAPE, capacity=4, buckets=(4,))
    plan, ones = plan_of("dpmsolver++2m", 6), {"shift": torch.ones(3)}
    three = Request(plan, plan.initial_scale * latents(0, 3), ones)
    held = engine.submit(three)
    batch = engine.next()  # its rows are with the host
    assert batch is not None
    engine.complete(batch, network(batch.x, batch.t, batch.conditioning["shift"]))
    batch = engine.next()
    assert batch is not None
    before = engine._state.registers.clone()
    alone = Request(plan_of("ddim", 6), latents(1, 1), {"shift": torch.ones(1), "kind": 1})
    (result,), around, recorder = graphed(engine, [alone])
    assert torch.equal(result.x, loop(alone))
    assert around.counts["replayed"] == 5
    assert recorder.captured[0].key.rows == 4
    changed = (engine._state.registers != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, False, True]
    engine.complete(batch, network(batch.x, batch.t, batch.conditioning["shift"]))
    assert torch.equal(run(engine)[held].x, loop(three))
