"""The engine on serial rows: what shares a call, and that every result is that of running alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import (
    SHAPE,
    conditioning,
    latents,
    loop,
    model,
    network,
    plan_of,
    requests,
    run,
    solo,
)
from torch import Tensor

from sidestep.runtime.engine import Batch, Engine, Request
from sidestep.runtime.methods.adaptive import Adaptive

# float32 against the float32 loop of Plan.run: the same terms, but the coefficients are rounded to
# float32 first and added in another order; a few roundings for each of up to 15 steps.
PLAN_RUN = {"rtol": 2e-5, "atol": 2e-5}


def test_requests_of_all_kinds_share_calls_and_equal_running_alone() -> None:
    made = requests(14)
    engine = Engine(SHAPE, capacity=7, buckets=(1, 2, 4, 8, 12))
    ids = [engine.submit(request) for request in made]
    sizes, together = [], 0
    for batch in engine:
        sizes.append(len(batch))
        together += len(set(batch.requests)) > 1
        assert len(batch) == min(b for b in engine.buckets if b >= batch.size)
        engine.complete(batch, model(batch))
    results = {result.id: result for result in engine.results()}
    assert list(results) != ids and sorted(results) == ids  # short ones overtake
    assert together > len(sizes) / 2
    for id, request in zip(ids, made, strict=True):
        result = results[id]
        assert (result.status, result.error, result.tag) == ("done", None, request.tag)
        assert torch.equal(result.x, loop(request))
        assert torch.equal(result.x, solo(request).x)
        assert result.nfe == (float(len(request.plan)),) * len(request.x)
    assert engine.results() == []
    assert engine.counts()["done"] == 14 and engine.counts()["free"] == 7


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++2m", "dpmsolver++3s", "sde-dpmsolver++2m"])
def test_serial_rows_take_the_plan(solver: str) -> None:
    plan, n = plan_of(solver, 9), 3
    x, given = plan.initial_scale * latents(1, n), conditioning(1, n, 2)
    noise = latents(2, 9 * plan.noise_columns * n).view(9, -1, n, *SHAPE)
    request = Request(
        plan, x, given, guidance=(-2.0, 3.0), noise=noise if plan.stochastic else None
    )

    def guided(x_in: Tensor, t: float) -> Tensor:
        u = network(torch.cat([x_in, x_in]), torch.full((2 * n,), t), given["shift"])
        return -2.0 * u[:n] + 3.0 * u[n:]

    expected = plan.run(guided, x, noise)
    torch.testing.assert_close(solo(request).x, expected, **PLAN_RUN)


@pytest.mark.parametrize("seed", range(4))
def test_requests_join_and_leave_at_any_tick(seed: int) -> None:
    chance = random.Random(seed)
    made = requests(10)
    chance.shuffle(made)
    engine = Engine(SHAPE, capacity=6, buckets=(2, 3, 8))
    waiting, ids, flying, cancelled = list(made), {}, [], set()
    while waiting or flying or engine.counts()["running"] or engine.counts()["waiting"]:
        turn = chance.random()
        if waiting and turn < 0.3:
            request = waiting.pop()
            ids[engine.submit(request)] = request
        elif turn < 0.6 and (batch := engine.next()) is not None:
            flying.append((batch, model(batch)))
        elif flying and turn < 0.95:
            engine.complete(*flying.pop(chance.randrange(len(flying))))
        elif ids and turn > 0.98 and len(cancelled) < 3:
            id = chance.choice(list(ids))
            if engine.cancel(id):
                cancelled.add(id)
    results = {result.id: result for result in engine.results()}
    assert sorted(results) == sorted(ids)
    for id, request in ids.items():
        if id in cancelled:
            assert (results[id].status, results[id].x) == ("cancelled", None)
        else:
            assert torch.equal(results[id].x, loop(request))


def test_a_batch_says_what_is_in_it() -> None:
    plan = plan_of("euler", 4)
    first = Request(plan, latents(1, 2), conditioning(1, 2, 2), guidance=(0.5, 0.5))
    second = Request(plan[1:], latents(2, 1), conditioning(2, 1, 1))
    engine = Engine(SHAPE, buckets=(8,))
    engine.submit(first)
    engine.submit(second)
    batch = engine.next()
    assert batch is not None and (batch.size, len(batch)) == (5, 8)
    assert batch.requests == (0, 0, 1, 0, 0, 0, 0, 0)
    assert batch.rows == (0, 1, 0, 0, 1, 0, 0, 0)
    assert batch.branches == (0, 0, 0, 1, 1, 0, 0, 0)
    assert batch.steps == (0,) * 8
    scales, times = plan.input_scales, plan.timesteps
    assert scales[0] != scales[1]
    assert torch.equal(batch.x[1], (first.x[1] * torch.tensor(scales[0]).float()))
    assert torch.equal(batch.x[2], (second.x[0] * torch.tensor(scales[1]).float()))
    assert torch.equal(batch.x[3], batch.x[0]) and torch.equal(batch.x[7], batch.x[0])
    assert batch.t[[0, 2]].tolist() == pytest.approx([times[0], times[1]])
    a, b = first.conditioning["shift"], second.conditioning["shift"]
    assert batch.conditioning["shift"].tolist() == [*a[:2], *b, *a[2:], a[0], a[0], a[0]]
    assert engine.next() is None


def test_what_cannot_share_a_call_goes_apart() -> None:
    class Opaque:
        pass

    plan, held = plan_of("ddim", 3), Opaque()
    wide = torch.zeros(1, 2)
    table = torch.zeros(5, 2)  # no line for each entry: shared as it is
    kinds = [
        {"c": held},
        {"c": held},
        {"c": Opaque()},
        {"c": wide},
        {"c": torch.zeros(1, 2)},
        {"c": torch.zeros(1, 3)},
        {"c": torch.zeros(1, 2, dtype=torch.float16)},
        {"d": wide},
        [wide],
        {"c": 7.5},
        {"c": 7.5},
        {"c": 7},
        {"c": None},
        {"c": table},
        {"c": table},
    ]
    engine = Engine(SHAPE)
    for kind in kinds:
        engine.submit(Request(plan, latents(0, 1), kind))
    together = []
    while (batch := engine.next()) is not None:
        together.append(batch.requests[: batch.size])
        if batch.requests[0] == 13:
            assert batch.conditioning["c"] is table
    assert together == [
        (0, 1), (2,), (3, 4), (5,), (6,), (7,), (8,), (9, 10), (11,), (12,), (13, 14),
    ]  # fmt: skip


def test_conditioning_that_was_changed_fails_its_batch_only() -> None:
    plan, made = plan_of("ddim", 3), [conditioning(i, 1, 1) for i in range(3)]
    engine = Engine(SHAPE)
    for given in (*made[:2], {**made[2], "kind": 1}):  # the last one goes apart
        engine.submit(Request(plan, latents(0, 1), given))
    made[0]["shift"].unsqueeze_(1)
    results = run(engine)
    assert [results[id].status for id in range(3)] == ["failed", "failed", "done"]
    assert "number of dimensions" in str(results[0].error)
    assert engine.counts()["free"] == engine.capacity


def test_conditioning_may_be_nested() -> None:
    plan = plan_of("ddim", 2)
    given = [(torch.arange(4.0), {"text": torch.arange(8.0).view(4, 2), "scale": 2.0}), None]
    engine = Engine(SHAPE, buckets=(6,))
    engine.submit(Request(plan, latents(0, 2), given, guidance=(1.0, 1.0)))
    batch = engine.next()
    assert batch is not None
    (index, inner), nothing = batch.conditioning
    assert index.tolist() == [0, 1, 2, 3, 0, 0] and nothing is None and inner["scale"] == 2.0
    assert inner["text"].tolist() == [[2 * i, 2 * i + 1] for i in index.tolist()]


def test_guidance_may_change_with_the_step() -> None:
    plan = plan_of("dpmsolver++2m", 6)
    request = Request(
        plan, latents(3, 2), conditioning(3, 2, 2), guidance=[(1 - s, float(s)) for s in range(6)]
    )
    fixed = [loop(replace(request, plan=plan[:1], guidance=(1.0, 0.0)))]
    seen: list[Tensor] = []
    result = solo(replace(request, on_step=lambda k, x, rows: seen.append(x)))
    assert torch.equal(seen[0], fixed[0])
    given = request.conditioning["shift"]
    u = iter(range(6))

    def guided(x: Tensor, t: float) -> Tensor:
        both = network(torch.cat([x, x]), torch.full((4,), t), given)
        s = next(u)
        return (1 - s) * both[:2] + s * both[2:]

    torch.testing.assert_close(result.x, plan.run(guided, request.x), **PLAN_RUN)
    for same in (torch.tensor(request.guidance), np.array(request.guidance)):
        assert torch.equal(solo(replace(request, guidance=same)).x, result.x)


def test_a_plan_of_no_steps_is_done_at_once() -> None:
    engine, x = Engine(SHAPE), latents(0, 2)
    id = engine.submit(Request(plan_of("ddim", 4)[:0], x, tag="nothing"))
    (result,) = engine.results()
    assert (result.id, result.status, result.tag, result.ticks) == (id, "done", "nothing", 0)
    assert torch.equal(result.x, x) and result.x is not x
    assert result.nfe == (0.0, 0.0)
    assert engine.next() is None


@pytest.mark.parametrize("shape", [(1,), (129,), (4, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes_and_half_precision(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plan = plan_of("dpmsolver++2m", 5)
    engine = Engine(shape, capacity=3, buckets=(3,), dtype=dtype)
    made = [Request(plan, latents(i, 1, shape), conditioning(i, 1, 1)) for i in range(4)]
    ids = [engine.submit(request) for request in made]

    def half(batch: Batch) -> Tensor:
        assert batch.x.dtype == dtype and batch.x.shape == (3, *shape)
        return model(batch).to(dtype)

    results = run(engine, half)
    for id, request in zip(ids, made, strict=True):
        assert results[id].x.dtype == torch.float32
        alone = Engine(shape, capacity=1, buckets=(1,), dtype=dtype)
        alone.submit(request)
        (expected,) = run(alone, lambda batch: model(batch).to(dtype)).values()
        assert torch.equal(results[id].x, expected.x)


@pytest.mark.parametrize(
    "laid_out",
    [
        lambda u: torch.cat([u, u + 1.0], dim=1)[:, :3],  # learned variances beside the prediction
        lambda u: u.transpose(1, 2).contiguous().transpose(1, 2),
    ],
    ids=["slice", "transposed"],
)
@pytest.mark.parametrize("method", [None, Adaptive(mode="paper", threshold=0.3)])
def test_outputs_may_lie_in_memory_as_they_like(laid_out: Any, method: Any) -> None:
    plan = plan_of("ddim", 6)
    request = Request(plan, latents(1, 3), conditioning(1, 3, 1), method=method)
    engine = Engine(SHAPE)
    engine.submit(request)
    (result,) = run(engine, lambda batch: laid_out(model(batch))).values()
    assert result.error is None and torch.equal(result.x, solo(request).x)


def test_batches_of_two_engines_are_told_apart() -> None:
    request = Request(plan_of("ddim", 4), latents(1, 2), conditioning(1, 2, 1))
    first, second = Engine(SHAPE), Engine(SHAPE)
    first.submit(request)
    second.submit(replace(request, x=latents(2, 2)))
    batch, other = first.next(), second.next()
    assert batch is not None and other is not None and batch.ticket == other.ticket
    with pytest.raises(ValueError, match=r"Engine.complete: the batch belongs to another engine"):
        first.complete(other, model(other))
    with pytest.raises(ValueError, match=r"Engine.fail: the batch belongs to another engine"):
        second.fail(batch, RuntimeError("out of memory"))
    first.complete(batch, model(batch))
    (result,) = run(first).values()
    assert torch.equal(result.x, loop(request))


def test_noise_is_asked_for_once_and_in_order() -> None:
    plan, n = plan_of("sde-dpmsolver++2m", 7), 3
    tape = latents(5, 7 * n).view(7, 1, n, *SHAPE)
    asked = []

    def noise(k: int, j: int) -> Tensor:
        asked.append((k, j))
        return tape[k, j]

    request = Request(plan, latents(4, n), conditioning(4, n, 1), noise=noise)
    narrow = Engine(SHAPE, capacity=3, buckets=(2,))  # the rows cannot go in one call
    narrow.submit(request)
    (result,) = run(narrow).values()
    assert asked == [(k, j) for k in range(7) for j in range(int(plan.draws[k]))]
    assert torch.equal(result.x, loop(replace(request, noise=tape)))


def test_noise_may_come_in_one_tensor_that_is_filled_anew() -> None:
    plan, n = plan_of("sde-dpmsolver++2m", 7), 3
    tape, buffer = latents(5, 7 * n).view(7, 1, n, *SHAPE), torch.empty(n, *SHAPE)
    request = Request(
        plan, latents(4, n), conditioning(4, n, 1), noise=lambda k, j: buffer.copy_(tape[k, j])
    )
    narrow = Engine(SHAPE, capacity=3, buckets=(2,))  # rows of one request are a step apart
    narrow.submit(request)
    (result,) = run(narrow).values()
    assert torch.equal(result.x, loop(replace(request, noise=tape)))


def test_callbacks_see_every_step_of_every_row() -> None:
    plan, n = plan_of("ddim", 4), 3
    seen: dict[tuple[int, int], Tensor] = {}

    def on_step(k: int, x: Tensor, rows: list[int]) -> None:
        seen.update({(k, row): one for row, one in zip(rows, x, strict=True)})

    request = Request(plan, latents(1, n), conditioning(1, n, 1), on_step=on_step)
    engine = Engine(SHAPE, capacity=4, buckets=(2,))
    engine.submit(request)
    (result,) = run(engine).values()
    assert sorted(seen) == [(k, row) for k in range(4) for row in range(n)]
    for k in range(4):
        expected = loop(replace(request, plan=plan[: k + 1], on_step=None))
        assert torch.equal(torch.stack([seen[k, row] for row in range(n)]), expected)
    assert torch.equal(result.x, expected)


def test_plans_share_the_table_and_leave_it() -> None:
    plans = [plan_of("ddim", steps) for steps in (4, 5, 6, 7)]
    engine = Engine(SHAPE, table_steps=12)
    for turn in range(6):
        made = [
            Request(plans[(turn + i) % 4], latents(i, 1), conditioning(i, 1, 1)) for i in (0, 1, 0)
        ]
        if turn % 4 == 2:  # 6 and 7 steps, and no more than 12 fit
            with pytest.raises(RuntimeError, match=r"7 steps of .* hold 6 of 12"):
                [engine.submit(request) for request in made]
            made = made[:1]
        else:
            [engine.submit(request) for request in made]
        results = run(engine)
        assert len(results) == len(made)
        for id, request in zip(sorted(results), made, strict=True):
            assert torch.equal(results[id].x, loop(request))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_a_gpu() -> None:
    engine = Engine(SHAPE, capacity=7, buckets=(1, 2, 4, 8, 12), device="cuda")
    made = requests(12, methods=(None, Adaptive(mode="paper", threshold=0.3)))
    there = [
        replace(r, conditioning={"shift": r.conditioning["shift"].cuda()}, x=r.x.cuda())
        for r in made
    ]
    ids = [engine.submit(request) for request in there]
    results = run(engine)
    for id, request in zip(ids, made, strict=True):
        expected = solo(request)
        assert results[id].x.is_cuda
        torch.testing.assert_close(results[id].x.cpu(), expected.x, rtol=1e-4, atol=1e-4)
