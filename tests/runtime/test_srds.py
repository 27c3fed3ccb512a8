"""SRDS in the engine: counted calls, and results that equal the serial sampler's bit for bit."""

from __future__ import annotations

import math
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

from sidestep.kernels.core import parareal_cost, simulate_parareal
from sidestep.runtime.engine import Batch, Engine, Request, Result
from sidestep.runtime.engine_parareal import Parareal
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.srds import SRDS, Stop, formation_ticks
from sidestep.runtime.parareal import parareal
from sidestep.runtime.plan import Plan
from sidestep.runtime.planner import wavefront


def request_of(solver: str, steps: int, method: Any, n: int = 1, seed: int = 3) -> Request:
    plan = plan_of(solver, steps)
    x = plan.initial_scale * latents(seed, n)
    return Request(plan, x, conditioning(seed, n, 2), guidance=(-1.5, 2.5), method=method)


def parallel(request: Request, rows: int = 64, **settings: Any) -> Result:
    return solo(request, capacity=rows, buckets=range(1, 2 * rows + 1), **settings)


@pytest.mark.parametrize("coarse", ["krylov", "hold"])
@pytest.mark.parametrize(
    "case",
    requests(18, (SRDS(exact=True, blocks=4),)),
    ids=lambda r: f"{r.plan.name}-{len(r.x)}-{len(r.guidance)}",
)
def test_all_iterations_equal_the_serial_sampler_bit_for_bit(case: Request, coarse: str) -> None:
    result = parallel(replace(case, method=SRDS(exact=True, blocks=4, coarse=coarse)))
    assert result.status == "done", result.error
    assert torch.equal(result.x, loop(case))
    assert result.summary.errors == (0.0,) * len(case.x)


COUNTS = [
    (7, 7, 1),
    (26, 13, 4),
    (25, 5, 1),
    (25, 5, 3),
    (25, 5, 5),
    (49, 7, 2),
    (30, 6, 6),
    (24, 3, 2),
    (23, 1, 1),
]


@pytest.mark.parametrize(("steps", "blocks", "most"), COUNTS)
def test_calls_are_those_of_the_formula(steps: int, blocks: int, most: int) -> None:
    seen: set[tuple[bytes, float]] = set()
    evaluations = 0

    def counting(batch: Batch) -> Tensor:
        nonlocal evaluations
        for x, t, branch in zip(batch.x[: batch.size], batch.t, batch.branches, strict=False):
            if branch == 0:
                seen.add((x.numpy().tobytes(), float(t)))
                evaluations += 1
        return model(batch)

    method = SRDS(blocks=blocks, tolerance=0, max_iterations=most)
    request = request_of("ddim", steps, method)
    engine = Engine(SHAPE, capacity=blocks + 1, buckets=range(1, 2 * blocks + 3))
    engine.submit(request)
    (result,) = run(engine, counting).values()
    length = steps // blocks
    assert result.summary.iterations == (most,)
    assert result.ticks == most * (length - 1) + blocks
    total = length * (most * blocks - most * (most - 1) // 2) + blocks - most
    assert result.nfe == (float(total),)
    assert total == evaluations == parareal_cost(request.method.bounds(steps), most)
    if length > 1:  # else an iterate repeats the one before, bit for bit
        assert len(seen) == evaluations  # no state at a time is evaluated twice


def test_every_iteration_makes_one_block_more_exact_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = request_of("dpmsolver++2m", 17, SRDS(blocks=(0, 3, 4, 8, 12, 17), tolerance=0))
    formed: dict[tuple[int, int], Tensor] = {}
    form = Parareal._form

    def forming(self: Parareal, turn: Any) -> list[bool]:
        moved = form(self, turn)
        for image, (block, iterate, *_) in turn:
            formed[block, iterate] = image.boundaries[block][0].clone()
        return moved

    monkeypatch.setattr(Parareal, "_form", forming)
    parallel(request)
    for block, bound in enumerate((3, 4, 8, 12, 17), start=1):
        serial = loop(replace(request, plan=request.plan[:bound]))
        assert torch.equal(formed[block, block], serial.flatten())
    assert not torch.equal(formed[5, 4], formed[5, 5])  # nor before its turn


@pytest.mark.parametrize("bounds", [(0, 1, 5, 6, 11), (0, 4, 5, 11), (0, 2, 3, 7, 8, 11)])
def test_unequal_blocks_take_the_ticks_of_the_recurrence(bounds: tuple[int, ...]) -> None:
    for most in range(1, len(bounds)):
        method = SRDS(blocks=bounds, tolerance=0, max_iterations=most)
        result = parallel(request_of("dpmsolver++2m", 11, method))
        assert result.ticks == formation_ticks(bounds, most)[most, -1]
        assert result.nfe == (float(parareal_cost(bounds, most)),)


def test_iterates_are_those_of_the_definition() -> None:
    shown: dict[int, Tensor] = {}
    method = SRDS(blocks=(0, 2, 5, 9, 12), tolerance=0, max_iterations=3)
    request = request_of("dpmsolver++2m", 12, method, n=2)
    listening = replace(request, on_step=lambda p, x, rows: shown.setdefault(p, x.clone()))
    result = parallel(listening)
    shift = request.conditioning["shift"].double()

    def guided(x: Tensor, t: float) -> Tensor:
        time = torch.full((2,), t, dtype=torch.float64)
        first, second = (network(x, time, shift[2 * g : 2 * g + 2]) for g in range(2))
        return -1.5 * first + 2.5 * second

    iterates = parareal(request.plan, guided, request.x.double(), method.bounds(12), 3)
    assert sorted(shown) == [0, 1, 2, 3]
    for p, x in shown.items():
        torch.testing.assert_close(x.double(), iterates[p][-1][:, 0], rtol=2e-5, atol=2e-5)
    assert torch.equal(shown[3], result.x)
    assert not torch.allclose(shown[0], shown[3], atol=1e-3)


@pytest.mark.parametrize("capacity", [2, 3, 7])
def test_any_width_gives_the_same_bits(capacity: int) -> None:
    method = SRDS(blocks=6, tolerance=1e-3)
    wide = parallel(request_of("unipc2", 19, method, n=2))
    engine = Engine(SHAPE, capacity=capacity, buckets=(1, 2, 4))
    engine.submit(request_of("unipc2", 19, method, n=2))
    (narrow,) = run(engine).values()
    assert torch.equal(narrow.x, wide.x)
    assert narrow.summary.iterations == wide.summary.iterations
    assert narrow.summary.errors == wide.summary.errors
    assert narrow.ticks > wide.ticks


def test_images_together_are_the_same_as_alone() -> None:
    method = SRDS(blocks=5, tolerance=1e-2)
    together = parallel(request_of("ddim", 20, method, n=4))
    whole = request_of("ddim", 20, method, n=4)
    for i in range(4):
        alone = replace(
            whole, x=whole.x[i : i + 1], conditioning={"shift": whole.conditioning["shift"][i::4]}
        )
        result = parallel(alone)
        assert torch.equal(result.x[0], together.x[i])
        assert result.summary.iterations[0] == together.summary.iterations[i]
        assert result.summary.image_ticks[0] == together.summary.image_ticks[i]
    assert len(set(together.summary.iterations)) > 1  # otherwise the test says little


def test_requests_of_all_methods_share_calls_and_stay_what_they_are() -> None:
    methods = (SRDS(blocks=3, tolerance=1e-3), None, Adaptive(threshold=0.05), SRDS(exact=True))
    made = requests(12, methods)
    engine = Engine(SHAPE, capacity=24, buckets=(1, 2, 4, 8, 16, 32))
    ids = [engine.submit(request) for request in made]
    results = run(engine)
    for id, request in zip(ids, made, strict=True):
        assert results[id].status == "done", results[id].error
        alone = solo(replace(request, method=None)) if request.method is None else parallel(request)
        assert torch.equal(results[id].x, alone.x)


ESTIMATED = [
    ("ddim", 24, 8, 2.5, SHAPE, 0.02),
    ("ddim", 24, 8, 2.5, (4, 8, 8), 0.05),
    ("ddim", 50, None, 7.5, (4, 8, 8), 0.05),
    ("unipc2", 25, None, 7.5, (4, 8, 8), 0.05),
    ("dpmsolver++2m", 50, None, 7.5, (4, 8, 8), 0.02),
]


def stopping(solver: str, steps: int, guidance: float, shape: Any, method: SRDS) -> Request:
    rows = 24
    weights = (1 - guidance, guidance)
    x, text = latents(11, rows, shape), conditioning(11, rows, 2)
    return Request(plan_of(solver, steps), x, text, guidance=weights, method=method)


def wide(request: Request) -> Result:
    rows = 13 * len(request.x)
    engine = Engine(request.x.shape[1:], capacity=rows, buckets=range(1, 2 * rows + 1))
    engine.submit(request)
    (result,) = run(engine).values()
    return result


def test_the_estimate_bounds_the_error_of_19_samples_of_20() -> None:
    """Over samplers, blocks and guidance; every one stops early."""
    honest, count, above = 0, 0, 0
    for solver, steps, blocks, guidance, shape, tolerance in ESTIMATED:
        settings = SRDS(blocks=blocks, tolerance=tolerance)
        request = stopping(solver, steps, guidance, shape, settings)
        early, serial = wide(request), wide(replace(request, method=None))
        true = (early.x - serial.x).square().flatten(1).mean(1).sqrt().tolist()
        assert early.ticks < steps
        for error, estimate in zip(true, early.summary.errors, strict=True):
            assert estimate <= tolerance
            honest += error <= estimate
            above += error > tolerance
            count += 1
    assert honest >= 0.95 * count
    assert above <= 0.02 * count


def test_blocks_whose_start_hardly_moves_are_not_evaluated_again() -> None:
    """By a quarter fewer evaluations than if they were, and about as many as the planner says."""
    result = wide(stopping("unipc2", 25, 7.5, (4, 8, 8), SRDS()))
    bounds, made = SRDS().bounds(25), np.array(result.nfe)
    iterations = result.summary.iterations
    ends = [formation_ticks(bounds, K)[K, -1] for K in iterations]
    every = simulate_parareal(bounds, len(bounds) - 1).widths
    assert made.mean() < 0.75 * np.mean([every[:end].sum() for end in ends])
    planned = np.mean([wavefront(bounds, K)[0].sum() for K in iterations])
    assert made.mean() == pytest.approx(planned, rel=0.25)
    # the order of the calls makes no difference
    narrow = solo(stopping("unipc2", 25, 7.5, (4, 8, 8), SRDS()), capacity=40, buckets=(1, 7, 80))
    assert torch.equal(narrow.x, result.x) and narrow.summary.iterations == iterations


def test_an_end_that_does_not_move_does_not_stop_what_moves_before_it() -> None:
    """A model whose last step leads to the same picture wherever it comes from."""
    method = SRDS(blocks=(0, 4, 8, 12, 16, 20, 23, 24), tolerance=1e-3)
    request = request_of("ddim", 24, method, seed=8)
    (kept, added), *_ = request.plan.matrices[23].tolist()

    def forgetful(batch: Batch) -> Tensor:
        output = model(batch)
        for i, (x, step) in enumerate(zip(batch.x, batch.steps, strict=True)):
            if step == 23:
                output[i] = (0.3 - kept * x) / added
        return output

    ends: list[Tensor] = []
    listening = replace(request, on_step=lambda p, x, rows: ends.append(x.clone()))
    engine = Engine(SHAPE, capacity=16, buckets=range(1, 33))
    engine.submit(listening)
    (result,) = run(engine, forgetful).values()
    assert all(torch.allclose(end, torch.full_like(end, 0.3), atol=1e-5) for end in ends)
    assert result.summary.iterations == parallel(request).summary.iterations  # as if it moved
    assert result.summary.iterations[0] > 1


def test_a_model_that_depends_on_the_size_of_its_batch_is_no_reason_to_go_on() -> None:
    request = request_of("ddim", 48, SRDS(tolerance=0.05), n=8)
    serial, iterations = loop(request), []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)

        def rough(batch: Batch, generator: torch.Generator = generator) -> Tensor:
            output = model(batch)
            return output + 2e-3 * torch.randn(output.shape, generator=generator)

        engine = Engine(SHAPE, capacity=256, buckets=range(1, 513))
        engine.submit(request)
        (result,) = run(engine, rough).values()
        assert (result.x - serial).square().mean().sqrt() < 0.05
        iterations += result.summary.iterations
    assert max(iterations) <= 6  # of 16
    assert sum(iterations) <= 1.5 * len(iterations)


def test_a_result_that_stands_still_while_its_beginning_moves_goes_on() -> None:
    stop = Stop(SRDS(blocks=6), range(0, 25, 4))
    residuals = np.zeros((stop.most + 2, 7))
    residuals[1] = [0, 0.3, 0.4, 0.5, 0.4, 0.2, 1e-7]
    residuals[2] = [0, 0, 0.3, 0.4, 0.3, 0.1, 0]
    assert not stop.enough(stop.error(residuals, 1))
    residuals[2, 1:] = 1e-3
    assert stop.enough(stop.error(residuals, 1))


def test_what_the_starts_are_off_counts_in_the_estimate() -> None:
    stop = Stop(SRDS(blocks=6, tolerance=0.96), range(0, 25, 4))
    assert [stop.moved(change) for change in (0.0, 0.0099, 0.01, 0.5, math.nan)] == [
        False, False, True, True, True
    ]  # fmt: skip
    residuals = np.zeros((stop.most + 2, 7))
    for block in range(1, 7):  # of the exact ones the last that was seen, and those of iterate 3
        residuals[min(block, 3), block] = 0.001 * block
    assert stop.error(residuals, 3) == pytest.approx(0.006 + 0.015)  # x_6 has no block after it
    assert stop.error(residuals, stop.blocks) == pytest.approx(0.006)  # x_1, x_2, x_3
    residuals[3, 5] = 0.02  # a start that has moved is not off
    assert stop.error(residuals, 3) >= 0.006 + 0.010


def test_a_boundary_that_is_not_finite_ends_its_request_only() -> None:
    engine = Engine(SHAPE, capacity=32, buckets=range(1, 65))
    method = SRDS(blocks=4, tolerance=0)
    good, bad = request_of("ddim", 12, method, seed=1), request_of("ddim", 12, method, seed=2)
    good_id, bad_id = engine.submit(good), engine.submit(bad)

    def broken(batch: Batch) -> Tensor:
        output = model(batch)
        for i, (request, step) in enumerate(zip(batch.requests, batch.steps, strict=True)):
            if request == bad_id and step == 7:
                output[i] = torch.nan
        return output

    results = run(engine, broken)
    assert torch.equal(results[good_id].x, loop(good))
    assert results[bad_id].status == "failed"
    assert "row 0, block 3 of 4 in iteration 1: the latents are not finite" in str(
        results[bad_id].error
    )
    assert engine.counts()["running"] == 0


@pytest.mark.parametrize("capacity", [2, 3, 32])
def test_what_is_never_needed_does_not_fail_a_request_at_any_width(capacity: int) -> None:
    """A state of an iterate that the image does not wait for."""
    request = request_of("ddim", 24, SRDS(blocks=6, tolerance=0.05))
    serial = loop(request)
    calm = parallel(request)
    assert calm.summary.iterations == (2,)
    engine = Engine(SHAPE, capacity=capacity, buckets=range(1, 2 * capacity + 1))
    engine.submit(request)
    seen: set[bytes] = set()

    def broken(batch: Batch) -> Tensor:
        output = model(batch)
        for i, (x, step) in enumerate(zip(batch.x, batch.steps, strict=True)):
            if step == 23:  # the last step of the last block, from its third visit on
                seen.add(x.numpy().tobytes())
                if len(seen) > 2:
                    output[i] = torch.nan
        return output

    (result,) = run(engine, broken).values()
    assert result.status == "done", result.error
    assert torch.equal(result.x, calm.x)
    assert (result.x - serial).abs().max() < 0.2


OTHERS = {
    "DPMSolverMultistepScheduler": {"solver_order": 3, "final_sigmas_type": "zero"},
    "PNDMScheduler": {"skip_prk_steps": True},
    "FlowMatchEulerDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_compiled_schedulers_are_bit_for_bit_the_serial_sampler(name: str) -> None:
    import diffusers

    plan = Plan.from_scheduler(getattr(diffusers, name)(**OTHERS[name]), 13)
    blocks = (0, 3, 4, 8, 11, len(plan))
    x = plan.initial_scale * latents(7, 2)
    request = Request(plan, x, conditioning(7, 2, 2), guidance=(-1.5, 2.5))
    method = SRDS(exact=True, blocks=blocks)
    result = parallel(replace(request, method=method), registers=plan.registers)
    assert torch.equal(result.x, loop(request))


def test_a_request_can_be_cancelled_in_the_middle() -> None:
    engine = Engine(SHAPE, capacity=8, buckets=range(1, 17))
    method = SRDS(blocks=4, tolerance=0)
    other = request_of("ddim", 12, method, seed=5)
    cancelled, kept = engine.submit(request_of("ddim", 12, method)), engine.submit(other)
    for _ in range(6):
        batch = engine.next()
        engine.complete(batch, model(batch))
    assert engine.cancel(cancelled)
    results = run(engine)
    assert results[cancelled].status == "cancelled"
    assert torch.equal(results[kept].x, loop(other))
    assert engine.counts()["free"] == 8


def test_a_callback_may_cancel_its_request() -> None:
    engine = Engine(SHAPE, capacity=16, buckets=range(1, 33))
    method = SRDS(blocks=4, tolerance=0)
    kept = request_of("ddim", 12, method, seed=5)
    cancelled: list[int] = []
    stopping = replace(
        request_of("ddim", 12, method), on_step=lambda p, x, rows: engine.cancel(cancelled[0])
    )
    cancelled.append(engine.submit(stopping))
    id = engine.submit(kept)
    results = run(engine)
    assert results[cancelled[0]].status == "cancelled"
    assert torch.equal(results[id].x, loop(kept))


def test_iterations_that_run_out_are_told() -> None:
    result = parallel(request_of("ddim", 24, SRDS(blocks=6, tolerance=1e-7, max_iterations=1), n=2))
    assert result.summary.iterations == (1, 1)
    assert "images 0, 1 ended after max_iterations=1 above the tolerance of 1e-07" in str(
        result.summary
    )


def test_the_summary_counts_each_image() -> None:
    result = parallel(request_of("ddim", 20, SRDS(blocks=5, tolerance=3e-3), n=4))
    summary = result.summary
    assert summary.steps == 20
    assert max(summary.image_ticks) == summary.ticks
    ticks = formation_ticks(range(0, 21, 4), 5)
    for iterations, own in zip(summary.iterations, summary.image_ticks, strict=True):
        assert own == ticks[iterations, -1]
    assert f"{summary.iterations[0]} iterations, {summary.image_ticks[0]} sequential calls" in str(
        summary
    )


def test_a_plan_with_a_threshold_is_refused() -> None:
    from sidestep.runtime.thresholding import DynamicThreshold

    plan = plan_of("ddim", 4)
    clipped = replace(plan, threshold=DynamicThreshold(), data_maps=np.ones((4, 2)))
    engine = Engine(SHAPE)
    with pytest.raises(ValueError, match="has a threshold, which is not linear"):
        engine.submit(Request(clipped, latents(1, 1), method=SRDS()))
