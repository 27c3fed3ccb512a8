"""The engine of the C API gives the bits of the Python one, whatever shares its calls."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from pathlib import Path

import capi
import numpy as np
import pytest
import torch
from torch import Tensor

from sidestep import Adaptive, Engine, Plan, Request
from sidestep.runtime.schedules import DiscreteVP
from sidestep.runtime.solvers import find_solver

SCHEDULE = DiscreteVP.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SOLVERS = ("ddim", "dpmsolver++2m", "dpmsolver++3s", "sde-dpmsolver++2m", "unipc2", "euler")
D = 37  # no multiple of a vector
TORCH = {capi.FLOAT32: torch.float32, capi.FLOAT16: torch.float16, capi.BFLOAT16: torch.bfloat16}


def plan_of(solver: str, steps: int) -> Plan:
    return find_solver(solver).plan(SCHEDULE, "linspace", steps)


def network(x: Tensor, t: Tensor, branch: Tensor) -> Tensor:
    """Element by element in fp32, so that an entry has the same bits in any call."""
    wide = x.float()
    output = (wide * 0.8 + branch[:, None] * 0.1).clamp(-3, 3) - wide.abs() * 0.05
    return (output + t[:, None] * 1e-4).to(x.dtype)


def answer(engine: capi.Engine, call: capi.Call, dtype: torch.dtype) -> np.ndarray:
    """The model's outputs for a call, from what the engine wrote for it."""
    x = torch.from_numpy(engine.x[: call.size].copy()).view(dtype)
    branches = torch.tensor([float(engine.entries[i].branch) for i in range(call.size)])
    times = [engine.entries[i].time for i in range(call.size)]
    assert engine.t[: call.size].tolist() == np.float32(times).tolist()
    output = network(x, torch.from_numpy(engine.t[: call.size].copy()), branches)
    return output.view(torch.int16 if dtype != torch.float32 else torch.float32).numpy()


def drive(engine: capi.Engine, dtype: torch.dtype = torch.float32) -> int:
    """Calls the model until nothing needs it; how often."""
    calls = 0
    while (call := engine.next()).size:
        engine.complete(call, answer(engine, call, dtype))
        calls += 1
    return calls


def in_python(request: Request, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same request in the Python engine, alone."""
    engine = Engine((D,), capacity=8, dtype=dtype)
    engine.submit(request)
    for batch in engine:
        branches = torch.tensor(batch.branches, dtype=torch.float32)
        engine.complete(batch, network(batch.x, batch.t, branches))
    (result,) = engine.results()
    assert result.status == "done" and result.x is not None
    return result.x


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def plans(tmp_path: Path) -> Iterator[dict[str, tuple[Plan, ctypes.c_void_p]]]:
    """A plan of each solver, and its handle."""
    made = {}
    for i, solver in enumerate(SOLVERS):
        plan = plan_of(solver, 6 + i)
        plan.save(tmp_path / solver)
        made[solver] = plan, capi.load(tmp_path / solver)
    yield made
    for _, handle in made.values():
        capi.library().sidestep_plan_destroy(handle)


@pytest.mark.parametrize("dtype", TORCH)
def test_requests_of_all_solvers_share_calls(plans: dict, dtype: int) -> None:
    engine = capi.Engine(capi.options(D, capacity=5, dtype=dtype))
    expected = {}
    for i, (plan, handle) in enumerate(plans.values()):
        rows, branches = 1 + i % 3, 1 + i % 2
        x = noise(i, rows, D) * np.float32(plan.initial_scale)
        shape = len(plan), plan.noise_columns, rows, D
        drawn = noise(100 + i, *shape) if plan.stochastic else None
        weights = (1.0,) if branches == 1 else (-1.5, 2.5)
        request = Request(
            plan, torch.from_numpy(x.copy()), guidance=weights,
            noise=None if drawn is None else torch.from_numpy(drawn),
        )  # fmt: skip
        latents = x.copy()
        id = engine.submit(handle, latents, weights, drawn, tag=1000 + i)
        expected[id] = in_python(request, TORCH[dtype]), latents, len(plan), rows, i
    calls = drive(engine, TORCH[dtype])
    results = {result.request: result for result in engine.results()}
    assert results.keys() == expected.keys()
    for id, (picture, latents, steps, rows, i) in expected.items():
        result = results[id]
        assert (result.outcome, result.tag, result.error) == (capi.DONE, 1000 + i, b"")
        assert result.evaluations == steps * rows
        assert torch.equal(torch.from_numpy(latents), picture)
    assert calls < sum(steps for _, _, steps, _, _ in expected.values())
    assert engine.counts()["done"] == len(SOLVERS) and engine.counts()["free"] == 5
    engine.destroy()


def test_weights_for_each_step(plans: dict) -> None:
    plan, handle = plans["dpmsolver++2m"]
    weights = np.stack([1 - np.arange(len(plan)) / 3, np.arange(len(plan)) / 3], 1)
    x = noise(1, 2, D)
    latents = x.copy()
    engine = capi.Engine(capi.options(D))
    engine.submit(handle, latents, weights)
    drive(engine)
    request = Request(plan, torch.from_numpy(x), guidance=np.float32(weights).tolist())
    assert torch.equal(torch.from_numpy(latents), in_python(request))
    engine.destroy()


@pytest.mark.parametrize("threshold, max_skip", [(0.05, 4), (0.3, 2), (10.0, 3), (0.0, 4)])
def test_skips_are_those_of_the_published_program(
    tmp_path: Path, threshold: float, max_skip: int
) -> None:
    plan = plan_of("ddim", 30)
    plan.save(tmp_path / "plan")
    handle = capi.load(tmp_path / "plan")
    engine = capi.Engine(capi.options(D, capacity=3, skips=1))
    method = Adaptive(mode="paper", threshold=threshold, max_skip=max_skip)
    weights, evaluations, pairs = (-0.5, 1.5), 0, []
    for seed, rows in enumerate((2, 1, 1)):  # the last waits for a slot
        x = noise(seed, rows, D)
        latents = x.copy()
        engine.submit(handle, latents, weights, max_skip=max_skip, skip_threshold=threshold)
        request = Request(plan, torch.from_numpy(x), guidance=weights, method=method)
        pairs.append((latents, in_python(request)))
        python = Engine((D,), capacity=8)
        python.submit(request)
        for batch in python:
            branches = torch.tensor(batch.branches, dtype=torch.float32)
            python.complete(batch, network(batch.x, batch.t, branches))
        evaluations += round(sum(python.results()[0].nfe))
    drive(engine)
    results = engine.results()
    assert sum(result.evaluations for result in results) == evaluations
    assert (evaluations < 4 * 30) == (threshold > 0)
    for latents, picture in pairs:
        assert torch.equal(torch.from_numpy(latents), picture)
    capi.library().sidestep_plan_destroy(handle)
    engine.destroy()


def test_random_order_cancellation_and_failure_change_nobody_else(plans: dict) -> None:
    draw = random.Random(4)
    engine = capi.Engine(capi.options(D, capacity=4, buckets=(2, 5)))
    expected, out, results, waiting = {}, [], {}, list(range(24))
    while waiting or out or engine.counts()["waiting"] + engine.counts()["running"]:
        choice = draw.random()
        if choice < 0.3 and waiting and engine.counts()["waiting"] < 8:
            seed = waiting.pop()
            plan, handle = plans[("ddim", "dpmsolver++2m", "euler")[seed % 3]]
            latents = noise(seed, 1 + seed % 2, D)
            request = Request(plan, torch.from_numpy(latents.copy()))
            id = engine.submit(handle, latents, group=seed % 2)
            expected[id] = latents, request
        elif choice < 0.35 and expected:
            ended = ctypes.c_int32()
            id = draw.choice(list(expected))
            capi.must("engine_cancel", engine.handle, id, ctypes.byref(ended))
        elif choice < 0.7:
            call = engine.next()
            if call.size:
                groups = {engine.entries[i].request for i in range(call.size)}
                assert call.num_entries <= call.size and call.size in (2, 5) and groups
                out.append((call, answer(engine, call, torch.float32)))
        elif out:
            call, outputs = out.pop(draw.randrange(len(out)))
            if draw.random() < 0.05:
                capi.must("engine_fail", engine.handle, call.ticket, b"the GPU is away")
            else:
                engine.complete(call, outputs)
                engine.complete(call, outputs)  # again: changes nothing
        results |= {result.request: result for result in engine.results()}
    outcomes = [result.outcome for result in results.values()]
    assert {outcomes.count(kind) > 0 for kind in range(3)} == {True} and len(results) == 24
    for id, (latents, request) in expected.items():
        if results[id].outcome == capi.DONE:
            assert torch.equal(torch.from_numpy(latents), in_python(request))
        elif results[id].outcome == capi.FAILED_REQUEST:
            assert results[id].error == b"the GPU is away"
    engine.destroy()


def test_latents_that_are_not_finite_end_a_request_that_decides_by_them(plans: dict) -> None:
    plan, handle = plans["ddim"]
    engine = capi.Engine(capi.options(D, skips=1))
    bad, good = noise(0, 1, D), noise(1, 1, D)
    expected = in_python(Request(plan, torch.from_numpy(good.copy())))
    bad[0, 3] = np.nan
    engine.submit(handle, bad, max_skip=4, skip_threshold=0.1)
    engine.submit(handle, good)
    drive(engine)
    failed, done = engine.results()
    assert failed.error == b"row 0 at step 0: the latents are not finite"
    assert failed.outcome == capi.FAILED_REQUEST and done.outcome == capi.DONE
    assert torch.equal(torch.from_numpy(good), expected)
    engine.destroy()


@pytest.mark.parametrize("back", ["complete", "fail", "cancel"])
def test_a_batch_that_is_back_changes_nothing(plans: dict, back: str) -> None:
    plan, handle = plans["ddim"]
    x, ended = noise(0, 2, D), ctypes.c_int32()
    latents = x.copy()
    engine = capi.Engine(capi.options(D))
    first = engine.submit(handle, latents[:1])
    call = engine.next()
    one = answer(engine, call, torch.float32)
    arguments = engine.handle, call.ticket, capi.address(one)
    assert capi.call("engine_complete", *arguments, 2, None) == capi.INVALID
    assert "of 2 entries, expected those of the call's 1" in capi.error()
    if back == "complete":
        engine.complete(call, one)
    elif back == "fail":
        capi.must("engine_fail", engine.handle, call.ticket, None)
    else:
        capi.must("engine_cancel", engine.handle, first, ctypes.byref(ended))
    engine.submit(handle, latents[1:])
    for outputs, size in ((one, 1), (one, 2), (None, -1)):
        again = engine.handle, call.ticket, capi.address(outputs), size, None
        capi.must("engine_complete", *again)
    drive(engine)
    expected = {result.request: result.outcome for result in engine.results()}
    outcomes = {"complete": capi.DONE, "fail": capi.FAILED_REQUEST, "cancel": capi.CANCELLED}
    assert expected == {0: outcomes[back], 1: capi.DONE}
    for row in range(1 if back != "complete" else 0, 2):
        request = Request(plan, torch.from_numpy(x[row : row + 1]))
        assert torch.equal(torch.from_numpy(latents[row : row + 1]), in_python(request))
    engine.destroy()


def test_memory_of_the_caller(plans: dict) -> None:
    plan, handle = plans["dpmsolver++2m"]
    settings = capi.options(D, skips=1)
    size = ctypes.c_int64()
    capi.must("engine_memory", ctypes.byref(settings), ctypes.byref(size))
    formula = 4 * D * (4 * (4 + 1) + 2 * 4)
    assert formula < size.value < formula + 2 * 400 * 4 * 31 + 4096
    block = np.full(size.value + 512, 0xFF, np.uint8)
    begin = -block.ctypes.data % 256
    settings.memory, settings.memory_bytes = block.ctypes.data + begin, size.value
    engine = capi.Engine(settings)
    x = noise(3, 3, D)
    latents = x.copy()
    engine.submit(handle, latents)
    drive(engine)
    assert torch.equal(torch.from_numpy(latents), in_python(Request(plan, torch.from_numpy(x))))
    assert (block[:begin] == 0xFF).all() and (block[begin + size.value :] == 0xFF).all()
    engine.destroy()
    settings.memory += 8
    handle = ctypes.c_void_p()
    status = capi.call("engine_create", ctypes.byref(settings), ctypes.byref(handle))
    assert status == capi.INVALID and "an address divisible by 256" in capi.error()


def test_a_table_of_plans_makes_room(tmp_path: Path) -> None:
    engine = capi.Engine(capi.options(D, table_steps=25, capacity=1))
    lib, latents = capi.library(), noise(0, 1, D)
    for steps in (10, 12, 9, 25):
        plan = plan_of("ddim", steps)
        plan.save(tmp_path / "plan")
        handle, x = capi.load(tmp_path / "plan"), latents.copy()
        engine.submit(handle, x)
        lib.sidestep_plan_destroy(handle)  # the engine has what it needs
        drive(engine)
        request = Request(plan, torch.from_numpy(latents))
        assert torch.equal(torch.from_numpy(x), in_python(request))
    for steps, status in ((26, capi.INVALID), (20, capi.OK), (9, capi.FULL)):
        plan_of("ddim", steps).save(tmp_path / "plan")
        handle, x, weight = capi.load(tmp_path / "plan"), latents.copy(), np.float32([1])
        request = capi.Request(
            plan=handle, latents=capi.address(x), guidance=capi.address(weight), dim=D,
            guidance_steps=1, rows=1, branches=1,
        )  # fmt: skip
        id = ctypes.c_int64()
        assert (
            capi.call("engine_submit", engine.handle, ctypes.byref(request), ctypes.byref(id))
            == status
        ), steps
        lib.sidestep_plan_destroy(handle)
    assert "plans in use hold 20 of 25 lines" in capi.error()
    engine.destroy()
