"""What the processes of test_ranks.py run, each with a file of results.

python ranks_jobs.py FOLDER JOB:SIZE ...      starts SIZE processes for one job after the other
torchrun ... ranks_jobs.py FOLDER JOB         is one of them
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import conditioning, latents, model, plan_of
from torch import Tensor

from sidestep.runtime.engine import Batch, Request
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.ranks import RankError, Ranks

STEPS = 18
NAN_AT = 8
CASES: dict[str, tuple[str, SRDS, int]] = {
    "ddim-early": ("ddim", SRDS(blocks=6, tolerance=1e-2), 4),
    "ddim-odd": ("ddim", SRDS(blocks=5, tolerance=1e-3, coarse="hold"), 2),
    "2m-exact": ("dpmsolver++2m", SRDS(blocks=6, exact=True), 1),
    "2m-most": ("dpmsolver++2m", SRDS(blocks=7, tolerance=0, max_iterations=2), 2),
    "unipc-early": ("unipc2", SRDS(blocks=9, tolerance=3e-3), 3),
    "sde-exact": ("sde-dpmsolver++2m", SRDS(blocks=4, exact=True), 2),
    "sde-early": ("sde-dpmsolver++2m", SRDS(blocks=8, tolerance=1e-2), 2),
    "narrow": ("ddim", SRDS(blocks=8, tolerance=1e-3, width=1), 2),
    "unequal": ("euler", SRDS(blocks=(0, 2, 3, 7, 12, 18), tolerance=1e-3), 2),
    "single-steps": ("ddim", SRDS(blocks=18, tolerance=1e-3), 1),
    "few-blocks": ("ddim", SRDS(blocks=2, tolerance=1e-3), 1),
    "looks-back": ("unipc2", SRDS(blocks=(0, 1, 6, 7, 12, 18), tolerance=1e-3, coarse="2m"), 2),
    "guessed": ("ddim", SRDS(blocks=6, tolerance=1e-2, coarse="2m-krylov", spacing="log-snr"), 3),
    "one-block": ("ddim", SRDS(blocks=1, exact=True), 2),
}


def request_of(case: str) -> Request:
    solver, method, n = CASES[case]
    plan = plan_of(solver, STEPS)
    noise = None
    if plan.stochastic:
        drawn = latents(7, STEPS * plan.noise_columns * n)
        noise = drawn.view(STEPS, plan.noise_columns, n, *drawn.shape[1:])
    x = plan.initial_scale * latents(3, n)
    given = conditioning(3, n, 2)
    return Request(plan, x, given, guidance=(-1.5, 2.5), method=method, noise=noise)


def here(request: Request, rank: int) -> Request:
    """The start is on rank 0 only."""
    return request if rank == 0 else replace(request, x=torch.full_like(request.x, torch.nan))


def told(ranks: Ranks, request: Request, call: Callable[[Batch], Tensor], **how: Any) -> Any:
    """What a run came to, as plain values."""
    calls = [0, 0]

    def counting(batch: Batch) -> Tensor:
        calls[0] += 1
        calls[1] += sum(branch == batch.branches[0] for branch in batch.branches[: batch.size])
        return call(batch)

    begun = time.monotonic()
    try:
        result = ranks.run(here(request, ranks.rank), counting, **how)
    except RankError as error:
        return {"error": str(error), "seconds": time.monotonic() - begun}
    summary = result.summary
    return {
        "x": result.x,
        "iterations": summary.iterations,
        "errors": summary.errors,
        "calls": summary.ticks,
        "nfe": sum(summary.nfe),
        "counted": calls,
    }


Breaks = Callable[[Tensor, list[int]], Tensor]


def broken(rank: int | None, at: int, breaks: Breaks) -> Callable[[Batch], Tensor]:
    """The model, but what it says of one step is broken; on that rank, None for any."""

    def call(batch: Batch) -> Tensor:
        output = model(batch)
        lines = [i for i, step in enumerate(batch.steps) if step == at]
        concerned = rank is None or rank == dist.get_rank()
        return breaks(output, lines) if lines and concerned else output

    return call


def second_step(request: Request, rank: int) -> int:
    """Of the first block of a rank: it is always taken."""
    assert isinstance(request.method, SRDS)
    return request.method.bounds(STEPS)[rank] + 1


def not_a_number(output: Tensor, lines: list[int]) -> Tensor:
    output[lines] = torch.nan
    return output


def raising(output: Tensor, lines: list[int]) -> Tensor:
    raise ValueError("out of paper")


def dying(output: Tensor, lines: list[int]) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return output


def sleeping(output: Tensor, lines: list[int]) -> Tensor:
    time.sleep(4)
    return output


def slow(batch: Batch) -> Tensor:
    """Ranks that are not in step."""
    time.sleep(0.002 * (1 + dist.get_rank()) * (1 + batch.steps[0] % 3))
    return model(batch)


def job_blocks(found: dict[str, Any]) -> None:
    """All cases, twice in between with ranks out of step, and errors that the group survives."""
    with Ranks(timeout=30) as ranks:
        for case in CASES:
            found[case] = told(ranks, request_of(case), model)
        found["slow"] = told(ranks, request_of("ddim-early"), slow)
        found["padded"] = told(ranks, request_of("unipc-early"), model, buckets=(2, 4, 8))
        last = ranks.size - 1
        request = request_of("ddim-odd")
        found["nan"] = told(ranks, request, broken(None, NAN_AT, not_a_number))
        found["raised"] = told(ranks, request, broken(last, second_step(request, last), raising))
        found["raised at once"] = told(ranks, request, broken(0, 0, raising))
        other = request_of("ddim-early" if ranks.rank == 1 else "ddim-odd")
        found["other"] = told(ranks, other, model)
        found["again"] = told(ranks, request, model)


def job_guidance(found: dict[str, Any]) -> None:
    """Two ranks to a team."""
    Ranks(guidance_ranks=2).close()  # to be connected a second time
    with Ranks(guidance_ranks=2, timeout=30) as ranks:
        for case in ("ddim-early", "unipc-early", "sde-exact", "one-block"):
            found[case] = told(ranks, request_of(case), model)
        request = request_of("ddim-early")
        if ranks.size == 2:
            found["serial"] = told(ranks, replace(request, method=None), model)
        found["raised"] = told(ranks, request, broken(1, 6, raising))
        found["nan"] = told(ranks, request, broken(1, 6, not_a_number))
        found["again"] = told(ranks, request, model, buckets=(4, 16))


def job_dying(found: dict[str, Any]) -> None:
    """The last rank is killed in the middle."""
    ranks = Ranks(timeout=20)
    request, last = request_of("unipc-early"), ranks.size - 1
    found["dead"] = told(ranks, request, broken(last, second_step(request, last), dying))


def job_stuck(found: dict[str, Any]) -> None:
    """Rank 1 does not come back from its model."""
    ranks = Ranks(timeout=1.2)
    request = request_of("unipc-early")
    found["stuck"] = told(ranks, request, broken(1, second_step(request, 1), sleeping))


def job_helper_dying(found: dict[str, Any]) -> None:
    """A rank that evaluates a branch is killed."""
    ranks = Ranks(guidance_ranks=2, timeout=20)
    found["dead"] = told(ranks, request_of("ddim-odd"), broken(1, 6, dying))


def job_alone(found: dict[str, Any]) -> None:
    """A job of one process."""
    with Ranks() as ranks:
        for case in ("ddim-early", "unipc-early", "narrow"):
            found[case] = told(ranks, request_of(case), model)


def job_sets(found: dict[str, Any]) -> None:
    """Two sets of two, each with a request of its own."""
    with Ranks(2, timeout=30) as ranks:
        case = ("ddim-early", "unipc-early")[dist.get_rank() // 2]
        found[case] = told(ranks, request_of(case), model)


Jobs = Mapping[str, Callable[[dict[str, Any]], None]]
"""By name, what every process of a job does; it writes down what it finds."""


def start(jobs: Jobs, job: str, size: int, folder: str, rank: int) -> None:
    """One process that was forked."""
    store = f"file://{folder}/{job}-{size}-store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    work(jobs, job, size, folder)
    os._exit(0)  # without a barrier: other ranks may be dead


def work(jobs: Jobs, job: str, size: int, folder: str) -> None:
    """A rank's part of a job."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    jobs[job](found)
    torch.save(found, Path(folder) / f"{job}-{size}-{dist.get_rank()}.pt")


def main(jobs: Jobs, folder: str, wanted: Sequence[str]) -> None:
    """All wanted jobs, one after the other."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        work(jobs, wanted[0], dist.get_world_size(), folder)
        dist.destroy_process_group()
        return
    context = multiprocessing.get_context("fork")  # before this process has any other thread
    for job, size in (each.split(":") for each in wanted):
        processes = [
            context.Process(target=start, args=(jobs, job, int(size), folder, rank))
            for rank in range(int(size))
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    named = {name.removeprefix("job_"): job for name, job in globals().items() if "job_" in name}
    main(named, sys.argv[1], sys.argv[2:])
