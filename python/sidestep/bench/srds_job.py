"""The job of ``sidestep bench srds --processes``: what it is given, and the pictures it gives back.

torchrun starts the processes (`sidestep.bench.srds_ranks`).  They find the task in a folder, into
which the first of them writes a file for every prompt, whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sidestep.bench.srds_results import GuidanceSplit, Made
from sidestep.errors import UserError
from sidestep.runtime.methods.srds import SRDS
from sidestep.sampling import Run

TASK = "task.pt"
MODULE = "sidestep.bench.srds_ranks"

_START = 240.0  # seconds, for processes to begin on a machine that is busy
_END = 40.0  # seconds; torchrun kills what does not end when told to after 30


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the processes are to do.

    Attributes:
        model: As on the command line.
        scheduler: Its class.
        steps: Of the scheduler.
        guidance: The guidance scale.
        seed: Prompt i starts from seed + i.
        threads: Of each process.
        timeout: Seconds without a word after which the job has failed.
        prompts: Of each its number, its text, and in what ways its picture is made.
    """

    model: str
    scheduler: str
    steps: int
    guidance: float
    seed: int
    threads: int
    timeout: float
    prompts: Sequence[tuple[int, str, Sequence[SRDS | GuidanceSplit]]]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The pictures of one prompt.

    Attributes:
        index: Its number.
        serial: Made by the first process alone.
        made: Made by all of them, in the task's ways.
    """

    index: int
    serial: Run
    made: Sequence[Made]


def piece_file(folder: Path, index: int) -> Path:
    """Where a prompt's pictures are."""
    return folder / f"piece-{index}.pt"


def failure_file(folder: Path, rank: int) -> Path:
    """Where a process says why it has failed."""
    return folder / f"failed-{rank}.txt"


def command(processes: int, folder: Path) -> list[str]:
    """What is run."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(processes), "-m", MODULE, str(folder)]


def pieces(task: Task, processes: int) -> Generator[Piece, None, None]:
    """Runs the job; yields each prompt's pictures as they are there.

    Raises:
        UserError: A process has failed, or nothing came for too long.
    """
    with TemporaryDirectory(prefix="sidestep-srds-") as name:
        folder = Path(name)
        torch.save(task, folder / TASK)
        environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads)}
        with (folder / "output.txt").open("wb") as output:
            job = subprocess.Popen(
                command(processes, folder), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
        try:
            for number, (index, *_) in enumerate(task.prompts):
                # the processes' own time-out comes first, for it knows more
                seconds = task.timeout + (_END if number else _START)
                yield _awaited(job, folder, index, processes, seconds)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(_END)
        finally:
            _end(job)


def _awaited(
    job: subprocess.Popen[bytes], folder: Path, index: int, processes: int, seconds: float
) -> Piece:
    """The next piece."""
    file, end = piece_file(folder, index), time.monotonic() + seconds
    while not file.exists():
        code = job.poll()
        if code is not None and not file.exists():
            raise UserError(f"--processes: the job of {processes} failed: {_why(folder, code)}")
        if time.monotonic() > end:
            raise UserError(
                f"--processes: the job of {processes} gave no picture for {seconds:.0f} s, expected"
                " one; it was ended"
            )
        time.sleep(0.05)
    piece: Any = torch.load(file, weights_only=False)
    assert isinstance(piece, Piece)
    file.unlink()
    return piece


def _why(folder: Path, code: int) -> str:
    """What the first process that failed has said, or the last error that was printed."""
    told = sorted(folder.glob(failure_file(folder, 0).name.replace("0", "*")), key=_written)
    if told:
        return told[0].read_text()
    lines = (folder / "output.txt").read_text(errors="replace").splitlines()
    errors = [line.strip() for line in lines if "Error: " in line or "exitcode" in line]
    return errors[-1] if errors else f"it ended with code {code}"


def _written(file: Path) -> float:
    return file.stat().st_mtime


def _end(job: subprocess.Popen[bytes]) -> None:
    """Ends the processes that are left."""
    if job.poll() is None:
        job.terminate()  # torchrun passes it on
        try:
            job.wait(_END)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
