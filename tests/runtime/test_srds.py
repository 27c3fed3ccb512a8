"""SRDS in the engine: counted calls, and results that equal the serial sampler's bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
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
from srds_cases import parallel, request_of
from tiny_course import tiny_exits
from torch import Tensor

from sidestep.kernels.core import parareal_cost
from sidestep.runtime.engine import Batch, Engine, Request
from sidestep.runtime.engine_parareal import Parareal
from sidestep.runtime.exits.file import save_exits
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.coarse import COARSE
from sidestep.runtime.methods.early_exit import EarlyExit
from sidestep.runtime.methods.srds import SRDS, Stop, formation_ticks
from sidestep.runtime.parareal import parareal
from sidestep.runtime.plan import Plan


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


@pytest.mark.parametrize("coarse", list(COARSE))
def test_drafts_leave_the_result_as_it_is(coarse: str, tmp_path: Path) -> None:
    """Bit for bit, though the host gives nonsense where it may give a draft."""
    exits = tmp_path / "exits.safetensors"
    save_exits(tiny_exits(), exits)
    method = SRDS(exact=True, blocks=5, coarse=coarse, exits=EarlyExit(exits=exits))
    request = request_of("ddim", 20, method, n=2)
    drafts: list[tuple[int, int, int]] = []

    def rough(batch: Batch) -> Tensor:
        output = model(batch)
        assert len(batch.coarse) == len(batch)
        for i, draft in enumerate(batch.coarse[: batch.size]):
            if draft:
                drafts.append((batch.rows[i], batch.branches[i], batch.steps[i]))
                output[i] = 0.3 * torch.randn_like(output[i])
        return output

    engine = Engine(SHAPE, capacity=64, buckets=range(1, 129))
    engine.submit(request)
    (result,) = run(engine, rough).values()
    assert result.status == "done", result.error
    assert torch.equal(result.x, loop(request))
    every = [(row, g, step) for row in range(2) for g in range(2) for step in range(4, 20)]
    assert sorted(drafts) == every  # iterate 0 of all blocks but the first, once each
    stop = Stop(replace(method, exact=False), range(0, 25, 4))  # whatever the residuals are
    assert stop.moved(0.0, 1) and not stop.moved(0.0, 2)
    residuals = np.zeros((stop.most + 2, 7))
    assert not stop.enough(stop.error(residuals, 1)) and stop.enough(stop.error(residuals, 2))


def test_nothing_is_a_draft_without_exits() -> None:
    def whole(batch: Batch) -> Tensor:
        assert not any(batch.coarse)
        return model(batch)

    engine = Engine(SHAPE, capacity=64, buckets=range(1, 129))
    engine.submit(request_of("ddim", 20, SRDS(blocks=5)))
    (result,) = run(engine, whole).values()
    assert result.status == "done"
