"""Running a pipeline on prompts, plainly and with methods, batch by batch from the same noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestep.adapters.catalogue import make_scheduler, solver_name
from sidestep.adapters.enable import enable
from sidestep.errors import UserError
from sidestep.runtime.methods.adaptive import Adaptive


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way of making the pictures.

    Attributes:
        label: The name in tables and pictures.
        method: None for the plain pipeline, or a method's settings.
        solver: A plan of ours or a diffusers scheduler by name; None for the pipeline's own.
        grid: A time grid by name, for our plans; None for the solver's default.
        steps: Steps asked of the scheduler.
    """

    label: str
    method: Adaptive | None = None
    solver: str | None = None
    grid: str | None = None
    steps: int = 50


@dataclass
class Run:
    """What one job gave, over all prompts.

    Attributes:
        job: The job.
        solver: The solver's short name.
        images: ``[N, 3, H, W]`` float32 in [0, 1].
        nfe: N model evaluations per image; a guidance pair counts as one.
        ticks: Sequential model calls of each batch.
        seconds: Wall-clock of each batch.
        called: ``[N, steps]`` bool, which steps called the model; None for the plain pipeline.
        criterion: ``[N, steps]`` the number that decided, NaN where there was none.
    """

    job: Job
    solver: str
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    nfe: list[float] = field(default_factory=list)
    ticks: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    called: np.ndarray | None = None
    criterion: np.ndarray | None = None

    @property
    def median_seconds(self) -> float:
        """Median wall-clock of the batches, in seconds."""
        return statistics.median(self.seconds)


def run_jobs(
    pipe: Any,
    jobs: Sequence[Job],
    prompts: Sequence[str],
    *,
    guidance: float = 7.5,
    seed: int = 0,
    batch: int = 16,
    on_step: Callable[[str], None] | None = None,
) -> list[Run]:
    """Makes every prompt's picture by every job, each prompt from the same noise in all jobs.

    The jobs take turns on each batch, so that a disturbance of the machine meets all of them.
    Image ``i`` starts from a generator of its own, seeded ``seed + i``: the batch size does not
    change what is drawn.

    Args:
        pipe: A text-to-image pipeline; its scheduler is put back at the end.
        on_step: Called with the job's label after every step, for a progress bar.

    Raises:
        UserError: A solver or grid is unknown, or the scheduler refuses the steps.
    """
    own = pipe.scheduler
    runs = [Run(job=job, solver=solver_name(job.solver, job.grid, own)) for job in jobs]
    schedulers = [make_scheduler(job.solver, job.grid, own) for job in jobs]
    images: list[list[Tensor]] = [[] for _ in jobs]
    try:
        for first in range(0, len(prompts), batch):
            chunk = list(prompts[first : first + batch])
            for i, run in enumerate(runs):
                pipe.scheduler = schedulers[i]
                generators = [
                    torch.Generator().manual_seed(seed + first + j) for j in range(len(chunk))
                ]
                call = _call(pipe, run.job, chunk, guidance, generators, on_step)
                images[i].append(_timed(pipe, run, call, len(chunk)))
    finally:
        pipe.scheduler = own
    for run, parts in zip(runs, images, strict=True):
        run.images = torch.cat(parts)
    return runs


def _call(
    pipe: Any,
    job: Job,
    prompts: list[str],
    guidance: float,
    generators: list[torch.Generator],
    on_step: Callable[[str], None] | None,
) -> Callable[[], Tensor]:
    def after_step(_pipe: Any, _k: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(job.label)
        return tensors

    def call() -> Tensor:
        try:
            with torch.no_grad():
                return pipe(
                    prompts,
                    num_inference_steps=job.steps,
                    guidance_scale=guidance,
                    generator=generators,
                    output_type="pt",
                    callback_on_step_end=after_step,
                ).images
        except (ValueError, TypeError) as error:
            raise UserError(f"{job.label}: {error}") from error

    return call


def _timed(pipe: Any, run: Run, call: Callable[[], Tensor], count: int) -> Tensor:
    """One batch: its pictures, with time and calls entered into ``run``."""
    if run.job.method is None:
        start = time.perf_counter()
        images = call()
        run.seconds.append(time.perf_counter() - start)
        calls = len(pipe.scheduler.timesteps)
        run.nfe += [float(calls)] * count
        run.ticks.append(calls)
        return images.float().cpu()
    with enable(pipe, run.job.method) as handle:
        start = time.perf_counter()
        images = call()
        run.seconds.append(time.perf_counter() - start)
        summary = handle.summary()
    run.nfe += list(summary.nfe)
    run.ticks.append(summary.ticks)
    run.called = _stack(run.called, np.asarray(summary.skip_map, dtype=bool))
    run.criterion = _stack(run.criterion, np.asarray(summary.criterion, dtype=np.float64))
    return images.float().cpu()


def _stack(above: np.ndarray | None, below: np.ndarray) -> np.ndarray:
    return below if above is None else np.concatenate([above, below])
