"""The model calls of a pipeline, written down and made again in any number; and their time."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from sidestep.adapters.enable import Handle
from sidestep.adapters.trajectory import WholeTrajectory
from sidestep.adapters.trajectory_record import Trajectory
from sidestep.errors import UserError
from sidestep.runtime.denoisers import RecordedDenoiser
from sidestep.runtime.engine import Engine, Request
from sidestep.runtime.latency import Latency
from sidestep.runtime.methods.srds import SRDS

_ITERATIONS = 2  # of the engine's runs with a model that costs nothing
_RUNS = 3  # of these, after a first one


class Recorder(WholeTrajectory):
    """Writes the pipeline's calls down and runs nothing.

    Attributes:
        trajectory: The last generation.
        seconds: What its recording took, without the model's own time.
    """

    def __init__(self) -> None:
        """Makes a driver."""
        super().__init__(SRDS())
        self.trajectory: Trajectory | None = None
        self.seconds = 0.0

    def plan(self, scheduler: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A generation begins."""
        super().plan(scheduler, args, kwargs)
        self.seconds = -time.perf_counter()

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the driver; in the first step the model is really called."""
        return self._timed(super().predict, *args, **kwargs)

    def assist(self, *args: Any, **kwargs: Any) -> Any:
        """As the driver, likewise."""
        return self._timed(super().assist, *args, **kwargs)

    def _timed(self, stand_in: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        real, start = self._recording.trajectory is None, time.perf_counter()
        output = stand_in(*args, **kwargs)
        if real:
            _wait()
            self.seconds -= time.perf_counter() - start
        return output

    def _run(self, trajectory: Trajectory, latents: Tensor, generator: Any) -> Tensor:
        trajectory.library.expect_unwritten()
        self.seconds += time.perf_counter()
        self.trajectory = trajectory
        return latents


def record(
    pipe: Any, steps: int, images: int, arguments: Mapping[str, Any]
) -> tuple[Trajectory, float]:
    """The pipeline's calls, and the seconds that a step of writing them down takes.

    Raises:
        UserError: The pipeline cannot be called with these arguments.
        ValueError: It is enabled already, or cannot be taken over.
    """
    given = {"output_type": "latent", "num_inference_steps": steps, **arguments}
    if (
        "prompt" in inspect.signature(type(pipe).__call__).parameters
        and "prompt_embeds" not in given
    ):
        given.setdefault("prompt", ["a picture"] * images)
    given.setdefault("generator", [torch.Generator().manual_seed(i) for i in range(images)])
    handle, recorder = Handle(pipe, SRDS(), "whole"), Recorder()
    handle._driver = recorder
    handle._attach()
    with handle, torch.no_grad():
        for _ in range(2):  # the first one imports and compiles what the second finds
            recorder._compiled.clear()  # but every handle compiles its sampler
            try:
                pipe(**given)
            except TypeError as error:
                raise UserError(
                    f"auto: {type(pipe).__name__} cannot be called with "
                    f"{', '.join(sorted(given))}: {error}"
                ) from error
    if recorder.trajectory is None:
        raise UserError(f"auto: {type(pipe).__name__} has taken no step, expected {steps}")
    return recorder.trajectory, recorder.seconds / steps


def sizes_of(
    trajectory: Trajectory, branches: int, most: int, repeats: int, budget: float
) -> list[float]:
    """A single branch, and 1, 2, 4, ... evaluations, as far as the time goes; all of them called.

    The first call of a size costs more than later ones, and counts nowhere.
    """
    end = time.perf_counter() + budget
    sizes = [1 / branches] if branches > 1 else []
    sizes += [float(2**i) for i in range(max(2, most.bit_length()))]
    for number, size in enumerate(sizes, 1):
        _call(trajectory, size, branches)()
        seconds = clock(_call(trajectory, size, branches))
        if number > 2 and time.perf_counter() + 4 * seconds * repeats > end:
            return sizes[:number]
    return sizes


def time_sizes(
    trajectory: Trajectory,
    branches: int,
    sizes: Iterable[float],
    repeats: int,
    on_call: Callable[[], None] | None = None,
) -> dict[float, list[float]]:
    """Seconds of model calls, by evaluations.

    The sizes take turns, so that a disturbance of the machine meets all of them.
    """
    times: dict[float, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size, found in times.items():
            found.append(clock(_call(trajectory, size, branches)))
            if on_call is not None:
                on_call()
    return times


def latency_of(times: Mapping[float, Sequence[float]]) -> Latency:
    """The medians of what `time_sizes` gave."""
    return Latency(tuple((size, statistics.median(found)) for size, found in times.items()))


def _call(trajectory: Trajectory, size: float, branches: int) -> Callable[[], object]:
    """A model call of so many evaluations, at different steps as in SRDS."""
    start, steps = trajectory.start, trajectory.steps
    denoiser = RecordedDenoiser(rows=len(start), shape=start.shape[1:], steps=steps)
    places = [  # step 0 was called already
        (1 + (i // len(start)) % (len(steps) - 1), i % len(start)) for i in range(math.ceil(size))
    ]
    told = range(branches if size >= 1 else 1)
    lines = [(step, row, branch) for branch in told for step, row in places]
    x = torch.stack([start[row] for _, row, _ in lines]).to(steps[0].calls[0].arguments.dtype)

    @torch.no_grad()
    def call() -> Tensor:
        return denoiser(x, lines)

    return call


def engine_share(trajectory: Trajectory, branches: int) -> tuple[float, float]:
    """Seconds of a tick and of an evaluation in it, beside the model.

    The engine runs several times with a model that costs nothing; of every tick the median counts,
    and a line is laid through them.
    """
    start, sampler = trajectory.start, trajectory.plan
    method = SRDS(tolerance=0, max_iterations=_ITERATIONS)
    capacity = len(start) * method.rows(len(sampler))
    engine = Engine(
        tuple(start.shape[1:]), capacity=capacity, buckets=tuple(range(1, branches * capacity + 1)),
        device=start.device, registers=sampler.registers, history=0, branches=branches,
        table_steps=len(sampler),
    )  # fmt: skip
    x = start.float()
    request = Request(
        plan=sampler, x=x, guidance=[1 / branches] * branches, method=method,
        noise=(lambda k, j: torch.zeros_like(x)) if sampler.stochastic else None,
    )  # fmt: skip
    runs: list[list[float]] = []
    for _ in range(1 + _RUNS):
        engine.submit(request)
        sizes, seconds = [], []
        began = time.perf_counter()
        for batch in engine:
            engine.complete(batch, batch.x * 0.1)
            _wait()
            ended = time.perf_counter()
            sizes.append(batch.size / branches)
            seconds.append(ended - began)
            began = ended
        runs.append(seconds)
        (result,) = engine.results()
        if result.error is not None:
            raise result.error
    times = np.median(runs[1:], axis=0)
    (tick, evaluation), _ = nnls(np.stack([np.ones_like(sizes), sizes], 1), times)
    return float(tick), float(evaluation)


def clock(call: Callable[[], object]) -> float:
    """Seconds of a call, to the end of what it has given a GPU to do."""
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
