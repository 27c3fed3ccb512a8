"""What each process of ``sidestep bench srds --processes`` does.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m sidestep.bench.srds_ranks DIR

The folder has the task (`sidestep.bench.srds_job`, which starts it).  Of every prompt the first
process makes the serial picture alone, with the threads that it has in a team too, while the others
wait; then all of them make it together, in every way.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sidestep.bench.srds_job import TASK, Piece, Task, failure_file, piece_file
from sidestep.bench.srds_results import GuidanceSplit, Made, label_of
from sidestep.models import load_pipeline
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.ranks import Ranks
from sidestep.sampling import Job, Run, run_jobs


class Process:
    """One of them, with its pipeline and its connections."""

    def __init__(self, task: Task, stack: ExitStack) -> None:
        """Connects the processes, as the task's ways need it.

        Args:
            task: What they do.
            stack: Closes the connections.
        """
        self._task, self._pipe = task, load_pipeline(task.model)
        self._pipe.set_progress_bar_config(disable=True)
        ways = {way for *_, each in task.prompts for way in each}
        self._blocks = stack.enter_context(Ranks(timeout=task.timeout))
        self._branches: Ranks | None = None
        if GuidanceSplit() in ways:
            self._branches = stack.enter_context(Ranks(guidance_ranks=2, timeout=task.timeout))

    def warm_up(self) -> None:
        """First generations cost more than later ones; they are nobody's."""
        size = dist.get_world_size()
        ways: list[SRDS | GuidanceSplit] = [SRDS(blocks=size, max_iterations=1)]
        if self._branches is not None:
            ways.append(GuidanceSplit())
        for way in ways:
            self._run(self._job(way, 2 * size), 0, "")

    def piece(self, index: int, text: str, ways: list[SRDS | GuidanceSplit]) -> Piece:
        """All pictures of one prompt."""
        # They take turns at being first, so that a disturbance of the machine meets all of them.
        turn = -1 if index % 2 else 1
        serial, made = Run(job=Job(label="serial"), solver=""), list[Made]()
        for way in [None, *ways][::turn]:
            if way is not None:
                made.append(self._together(way, index, text))
                continue
            if dist.get_rank() == 0:
                serial = self._run(self._job(None, self._task.steps), index, text)
            dist.barrier()
        return Piece(index=index, serial=serial, made=made[::turn])

    def _together(self, way: SRDS | GuidanceSplit, index: int, text: str) -> Made:
        """One picture by all processes, with the evaluations of all and the calls of this one."""
        run = self._run(self._job(way, self._task.steps), index, text)
        made = replace(Made.of(run), ticks=run.ticks)
        if isinstance(way, GuidanceSplit):  # each evaluates a branch of all
            return replace(made, iterations=[0], nfe=[float(self._task.steps)], estimates=None)
        evaluations = torch.tensor(run.nfe, dtype=torch.float64)
        dist.all_reduce(evaluations)
        estimates = made.estimates if way.max_iterations is None else None  # it looks at none
        return replace(made, nfe=evaluations.tolist(), estimates=estimates)

    def _job(self, way: SRDS | GuidanceSplit | None, steps: int) -> Job:
        split = isinstance(way, GuidanceSplit)
        return Job(
            label=label_of(way), method=way if isinstance(way, SRDS) else None,
            solver=self._task.scheduler, steps=steps,
            ranks=None if way is None else self._branches if split else self._blocks,
        )  # fmt: skip

    def _run(self, job: Job, index: int, text: str) -> Run:
        task = self._task
        [run] = run_jobs(
            self._pipe, [job], [text], guidance=task.guidance, seed=task.seed + index, batch=1
        )
        return run


def work(folder: Path) -> None:
    """Does the task; the first process writes down what was made."""
    task: Any = torch.load(folder / TASK, weights_only=False)
    assert isinstance(task, Task)
    torch.set_num_threads(task.threads)
    dist.init_process_group("gloo", timeout=timedelta(seconds=task.timeout))
    with ExitStack() as stack:
        process = Process(task, stack)
        process.warm_up()
        for index, text, ways in task.prompts:
            piece = process.piece(index, text, list(ways))
            if dist.get_rank() == 0:
                whole = piece_file(folder, index)
                torch.save(piece, whole.with_suffix(".part"))
                os.replace(whole.with_suffix(".part"), whole)
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """A process; it leaves a sentence where it fails."""
    folder = Path(sys.argv[1])
    try:
        work(folder)
    except Exception as error:
        sentence = f"{type(error).__name__}: {' '.join(str(error).split())}"
        failure_file(folder, int(os.environ["RANK"])).write_text(sentence)
        raise


if __name__ == "__main__":
    main()
