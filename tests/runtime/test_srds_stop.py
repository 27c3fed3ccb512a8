"""When an image of SRDS stops: what its estimate of the error promises, and what it leaves out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import SHAPE, conditioning, latents, loop, model, plan_of, run, solo
from srds_cases import parallel, request_of
from torch import Tensor

from sidestep.kernels.core import simulate_parareal
from sidestep.runtime.engine import Batch, Engine, Request, Result
from sidestep.runtime.methods.srds import SRDS, Stop, formation_ticks
from sidestep.runtime.planner import wavefront

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
    assert [stop.moved(change, 2) for change in (0.0, 0.0099, 0.01, 0.5, math.nan)] == [
        False, False, True, True, True
    ]  # fmt: skip
    residuals = np.zeros((stop.most + 2, 7))
    for block in range(1, 7):  # of the exact ones the last that was seen, and those of iterate 3
        residuals[min(block, 3), block] = 0.001 * block
    assert stop.error(residuals, 3) == pytest.approx(0.006 + 0.015)  # x_6 has no block after it
    assert stop.error(residuals, stop.blocks) == pytest.approx(0.006)  # x_1, x_2, x_3
    residuals[3, 5] = 0.02  # a start that has moved is not off
    assert stop.error(residuals, 3) >= 0.006 + 0.010
