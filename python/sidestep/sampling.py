"""Running a pipeline on prompts, plainly and with methods, batch by batch from the same noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sidestep.adapters.calling import own_size
from sidestep.adapters.catalogue import make_scheduler, solver_name
from sidestep.adapters.enable import enable
from sidestep.errors import UserError
from sidestep.runtime.methods.criterion import Method
from sidestep.runtime.methods.srds import SRDS

if TYPE_CHECKING:
    from sidestep.runtime.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way of making the pictures.

    Attributes:
        label: The name in tables and pictures.
        method: None for the plain pipeline, or a method's settings.
        solver: A plan of ours or a diffusers scheduler by name; None for the pipeline's own.
        grid: A time grid by name, for our plans; None for the solver's default.
        steps: Steps asked of the scheduler.
        ranks: All processes of a job, each of which runs it; None for this one alone.
    """

    label: str
    method: Method | SRDS | None = None
    solver: str | None = None
    grid: str | None = None
    steps: int = 50
    ranks: Ranks | None = None


@dataclass
class Run:
    """What one job gave, over all prompts.

    Attributes:
        job: The job.
        solver: The solver's short name.
        images: ``[N, 3, H, W]`` float32 in [0, 1].
        latents: ``[N, ...]`` float32, after the last step; empty where the pipeline has none.
        nfe: N model evaluations per image; a guidance pair counts as one.
        ticks: Sequential model calls of each batch.
        seconds: Wall-clock of each batch.
        sizes: Images of each batch.
        called: ``[N, steps]`` bool, which steps called the model; None for the plain pipeline and
            for SRDS.
        criterion: ``[N, steps]`` the number that decided, NaN where there was none; None likewise.
        iterations: N iterations of SRDS; empty for others.
        errors: N errors in the latents as SRDS estimates them, root mean square.
        image_ticks: N sequential model calls of each image by SRDS.
        layers: N blocks of the model that each image ran a step, in the mean, by `EarlyExit`; empty
            for others.
    """

    job: Job
    solver: str
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    nfe: list[float] = field(default_factory=list)
    ticks: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    called: np.ndarray | None = None
    criterion: np.ndarray | None = None
    iterations: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    image_ticks: list[int] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)

    @property
    def median_seconds(self) -> float:
        """Median wall-clock of the full batches, in seconds."""
        full = max(self.sizes)
        return statistics.median(
            s for s, n in zip(self.seconds, self.sizes, strict=True) if n == full
        )


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

    The jobs take turns on each batch, and at being first, so that a disturbance of the machine
    meets all of them. Image ``i`` starts from a generator of its own, seeded ``seed + i``: the
    batch size does not change what is drawn.

    Args:
        pipe: A text-to-image pipeline; its scheduler is put back at the end.
        on_step: Called with the job's label after every step, for a progress bar.

    Raises:
        UserError: A solver or grid is unknown, the scheduler refuses the steps, or the model's
            parts do not fit together.
    """
    own = pipe.scheduler
    runs = [Run(job=job, solver=solver_name(job.solver, job.grid, own)) for job in jobs]
    schedulers = [make_scheduler(job.solver, job.grid, own) for job in jobs]
    for job, scheduler in zip(jobs, schedulers, strict=True):
        check_steps(job, scheduler)
    made: list[list[tuple[Tensor, Tensor]]] = [[] for _ in jobs]
    try:
        _warm_up(pipe, list(prompts[:batch]), guidance)
        for number, first in enumerate(range(0, len(prompts), batch)):
            chunk = list(prompts[first : first + batch])
            order = range(len(jobs)) if number % 2 == 0 else reversed(range(len(jobs)))
            for i in order:
                pipe.scheduler = schedulers[i]
                generators = [
                    torch.Generator().manual_seed(seed + first + j) for j in range(len(chunk))
                ]
                call = make_call(pipe, jobs[i], chunk, guidance, generators, on_step)
                made[i].append(_timed(pipe, runs[i], call, len(chunk)))
    finally:
        pipe.scheduler = own
    for run, parts in zip(runs, made, strict=True):
        run.images, run.latents = (torch.cat(each) for each in zip(*parts, strict=True))
    return runs


def check_steps(job: Job, scheduler: Any) -> None:
    """Refuses a number of steps that the scheduler refuses, before any work is done."""
    if scheduler.config.get("use_dynamic_shifting"):
        return  # needs what only the pipeline knows
    try:
        scheduler.set_timesteps(job.steps)
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"--steps: {job.steps} with {type(scheduler).__name__}: {error}") from error


def _warm_up(pipe: Any, prompts: list[str], guidance: float) -> None:
    """First calls cost more than later ones; they are nobody's.

    Raises:
        UserError: The parts of the model do not fit together, which shows here first.
    """
    try:
        with torch.no_grad():
            pipe(
                prompts,
                num_inference_steps=1,
                guidance_scale=guidance,
                output_type="pt",
                **own_size(pipe),
            )
    except RuntimeError as error:
        if not any(words in str(error) for words in ("size of tensor", "cannot be multiplied")):
            raise
        raise UserError(f"--model: its parts do not fit together: {error}") from error


def make_call(
    pipe: Any,
    job: Job,
    prompts: list[str],
    guidance: float,
    generators: list[torch.Generator],
    on_step: Callable[[str], None] | None = None,
) -> Callable[[], tuple[Tensor, Tensor]]:
    """What makes one batch by a job: its pictures ``[N, 3, H, W]`` and latents ``[N, ...]``."""
    latents = torch.empty(0)

    def after_step(_pipe: Any, _k: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal latents
        latents = tensors.get("latents", latents)
        if on_step is not None:
            on_step(job.label)
        return tensors

    def call() -> tuple[Tensor, Tensor]:
        try:
            with torch.no_grad():
                images = pipe(
                    prompts,
                    num_inference_steps=job.steps,
                    guidance_scale=guidance,
                    generator=generators,
                    output_type="pt",
                    callback_on_step_end=after_step,
                    **own_size(pipe),
                ).images
        except ValueError as error:
            raise UserError(f"{job.label}: {error}") from error
        return images, latents

    return call


def _timed(
    pipe: Any, run: Run, call: Callable[[], tuple[Tensor, Tensor]], count: int
) -> tuple[Tensor, Tensor]:
    """One batch: its pictures and latents, with time and calls entered into ``run``."""
    job = run.job
    if job.method is None and job.ranks is None:
        made = _clock(pipe, run, call)
        calls = len(pipe.scheduler.timesteps)
        run.nfe += [float(calls)] * count
        run.ticks.append(calls)
        return made
    try:
        driver = None if job.ranks is None else "whole"
        handle = enable(pipe, job.method, driver=driver, ranks=job.ranks)
    except ValueError as error:
        raise UserError(f"--method: {error}") from error
    with handle:
        if job.ranks is not None:  # nobody's time is that of another's beginning
            torch.distributed.barrier()
        made = _clock(pipe, run, call)
        summary = handle.summary()
    run.nfe += list(summary.nfe)
    run.ticks.append(summary.ticks)
    run.layers += [statistics.mean(row) for row in summary.layers]
    if summary.iterations:
        run.iterations += summary.iterations
        run.errors += summary.errors
        run.image_ticks += summary.image_ticks
    else:
        run.called = _stack(run.called, np.asarray(summary.skip_map, dtype=bool))
        run.criterion = _stack(run.criterion, np.asarray(summary.criterion, dtype=np.float64))
    return made


def _clock(pipe: Any, run: Run, call: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    start = time.perf_counter()
    images, latents = call()
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
    run.seconds.append(time.perf_counter() - start)
    run.sizes.append(len(images))
    return images.float().cpu(), latents.float().cpu()


def _stack(above: np.ndarray | None, below: np.ndarray) -> np.ndarray:
    return below if above is None else np.concatenate([above, below])
