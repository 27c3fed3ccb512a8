"""Measures a pipeline on its device, and says what SRDS would gain there.

The pipeline is called twice with a driver that writes down its model calls and makes none
but the first (`sidestep.adapters.trajectory`).  These calls are then made again for 1, 2, 4, ...
evaluations at different times, with the pipeline's own conditioning, as SRDS would make them; and
the engine runs with a model that costs nothing, for its own share.  What follows from that is
arithmetic (`sidestep.runtime.planner`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sidestep.adapters.enable import enable
from sidestep.adapters.trajectory_record import Trajectory
from sidestep.errors import UserError
from sidestep.planning_calls import (
    clock,
    engine_share,
    latency_of,
    record,
    sizes_of,
    time_sizes,
)
from sidestep.runtime.latency import Latency, Overhead
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.planner import Candidate, Decision, plan, predict, settings_of

MESSAGE = 1e-3
"""Seconds that a tick takes longer with several ranks: latents from process to process with gloo,
on one machine. Measured once, and then assumed: a process that plans has nobody to send to."""

LINES = 32
"""Lines of the largest measured model call for each image, where no other number is given."""

FEWEST_STEPS = 4
"""Of a recording, which needs calls after the first."""

_BETWEEN = 2  # calls of each size between the runs of a check


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a device was found to take.

    Attributes:
        latency: Of a model call, by evaluations.
        overhead: Beside the model.
        images: That the recorded call makes.
        branches: Guidance branches of an evaluation.
        trajectory: The recorded calls.
        alone: Of a call while no other process is at work, if `latency` was measured beside some.
    """

    latency: Latency
    overhead: Overhead
    images: int
    branches: int
    trajectory: Trajectory = field(repr=False)
    alone: Latency | None = None

    def plan(self, steps: int, *, images: int | None = None, **more: Any) -> Decision:
        """`sidestep.runtime.planner.plan` with these numbers."""
        return plan(
            self.latency,
            steps,
            images=images or self.images,
            branches=self.branches,
            overhead=self.overhead,
            alone=self.alone,
            **more,
        )


def auto(pipe: Any, steps: int, images: int = 1, **arguments: Any) -> SRDS | None:
    """Settings of SRDS where they make the pipeline quicker on its device, else None.

        method = sidestep.auto(pipe, steps=100)
        if method is not None:
            sidestep.enable(pipe, method)

    Takes some seconds: the model is called with 1, 2, 4, ... evaluations.

    Args:
        pipe: A pipeline that `enable` takes.
        steps: Inference steps.
        images: Images that are made together.
        arguments: Of the pipeline's call, such as ``guidance_scale`` or ``image``. A prompt is
            made up where none is given.

    Raises:
        UserError: The pipeline cannot be called with these arguments.
        ValueError: It is enabled already, or SRDS cannot take it over; it says why.
    """
    return decide(pipe, steps, images, **arguments)[0]


def decide(
    pipe: Any, steps: int, images: int = 1, tolerance: float = SRDS.tolerance, **arguments: Any
) -> tuple[SRDS | None, str]:
    """As `auto`, and the reason in a sentence."""
    decision = measure(pipe, steps, images, **arguments).plan(steps)
    return settings_of(decision.choice, tolerance), decision.reason


def measure(
    pipe: Any,
    steps: int,
    images: int = 1,
    *,
    max_batch: int | None = None,
    repeats: int = 5,
    budget: float = 30.0,
    on_call: Callable[[], None] | None = None,
    **arguments: Any,
) -> Measured:
    """Measures the model's calls and what is beside them.

    Args:
        pipe: A pipeline that `enable` takes.
        steps: Inference steps.
        images: Images that are made together.
        max_batch: Most lines of a model call: a guidance pair has two. None is 32 for each image;
            at least two evaluations are made in any case.
        repeats: Calls of each size, of which the median counts.
        budget: Seconds, about, in which the sizes that can be measured are.
        on_call: Called after every measured call.
        arguments: Of the pipeline's call.

    Raises:
        UserError: The pipeline cannot be called with these arguments.
        ValueError: It is enabled already, or SRDS cannot take it over; it says why.
    """
    trajectory, each = record(pipe, max(steps, FEWEST_STEPS), images, arguments)
    return measure_recorded(
        trajectory, each, max_batch=max_batch, repeats=repeats, budget=budget, on_call=on_call
    )


def measure_recorded(
    trajectory: Trajectory,
    each: float = 0.0,
    *,
    max_batch: int | None = None,
    repeats: int = 5,
    budget: float = 30.0,
    on_call: Callable[[], None] | None = None,
) -> Measured:
    """As `measure`, where the calls have been written down already, of four steps or more.

    Args:
        trajectory: The calls.
        each: Seconds that the recording of a step takes.
        max_batch: As for `measure`, and so are the others.
        repeats: Calls of each size.
        budget: Seconds, about.
        on_call: Called after every measured call.
    """
    branches = len(trajectory.library.branches)
    lines = max_batch or LINES * len(trajectory.start)
    sizes = sizes_of(trajectory, branches, lines // branches, repeats, budget)
    times = time_sizes(trajectory, branches, sizes, repeats, on_call)
    tick, evaluation = engine_share(trajectory, branches)
    return Measured(
        latency=latency_of(times),
        overhead=Overhead(record=each, tick=tick, evaluation=evaluation, message=MESSAGE),
        images=len(trajectory.start),
        branches=branches,
        trajectory=trajectory,
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """A prediction beside what was measured, from noise to finished latents.

    Attributes:
        steps: N.
        blocks: B.
        images: That were made together.
        iterations: K of each image.
        ticks: Model calls in a row.
        seconds: ``(serial, SRDS)``, measured.
        predicted_seconds: The same, predicted with these iterations.
        speedup: Measured.
        predicted: With these iterations.
        foretold: With the iterations that were expected.
    """

    steps: int
    blocks: int
    images: int
    iterations: tuple[int, ...]
    ticks: int
    seconds: tuple[float, float]
    predicted_seconds: tuple[float, float]
    speedup: float
    predicted: float
    foretold: float


def check(
    pipe: Any,
    measured: Measured,
    candidate: Candidate,
    *,
    tolerance: float = SRDS.tolerance,
    rounds: int = 2,
    **arguments: Any,
) -> Check:
    """Runs an SRDS candidate for one rank, and the plain loop, in turns.

    The model calls are timed again in between, so that a machine that has become slower meanwhile
    is not taken for a wrong prediction. Like these, the runs do without CUDA graphs.

    Args:
        pipe: The pipeline that was measured.
        measured: What was found.
        candidate: To be tried.
        tolerance: Of the settings.
        rounds: Runs of each, all of which count.
        arguments: Of the pipeline's call, for ``measured.images`` images; without a generator the
            noise of each is seeded.

    Raises:
        UserError: The candidate is not SRDS on one rank.
    """
    method = settings_of(candidate, tolerance)
    if method is None or candidate.ranks != 1:
        raise UserError(
            f"check: got {candidate.kind} on {candidate.ranks} ranks, expected SRDS on one"
        )
    given = {"output_type": "latent", "num_inference_steps": candidate.steps, **arguments}
    times: dict[float, list[float]] = {size: [] for size, _ in measured.latency.points}

    def time_calls() -> None:
        found = time_sizes(measured.trajectory, measured.branches, times, _BETWEEN)
        for size in times:
            times[size] += found[size]

    plain = parallel = 0.0

    def generate() -> None:  # the same images every time, which need the same iterations
        noise = [torch.Generator().manual_seed(i) for i in range(measured.images)]
        pipe(**{"generator": noise, **given})

    for _ in range(rounds):
        time_calls()
        plain += clock(generate) / rounds
        time_calls()
        with enable(pipe, method, graphs="off") as handle:
            parallel += clock(generate) / rounds
            summary = handle.summary()
    latency, bounds = latency_of(times), method.bounds(candidate.steps)
    cost = predict(
        latency, bounds, summary.iterations, width=method.width, overhead=measured.overhead
    )
    serial = candidate.steps * float(latency(len(summary.iterations)))
    return Check(
        steps=candidate.steps, blocks=len(bounds) - 1, images=len(summary.iterations),
        iterations=summary.iterations, ticks=summary.ticks, seconds=(plain, parallel),
        predicted_seconds=(serial, cost.seconds), speedup=plain / parallel,
        predicted=serial / cost.seconds, foretold=candidate.speedup,
    )  # fmt: skip
