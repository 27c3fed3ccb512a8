"""Processes that are busy with a model, while this one measures it.

    python -m sidestep.planning_load MODEL THREADS

Processes of one machine share its caches, memory and clock: with two of them at work a model call
takes longer than with one, and what a planner foretells of ranks that share a machine has to be
measured so.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from sidestep.errors import UserError
from sidestep.models import load_pipeline

_READY = "ready"
_IMAGES = 1  # of a call


@contextlib.contextmanager
def busy(model: str, count: int, threads: int) -> Iterator[None]:
    """Keeps ``count`` more processes at work inside the ``with`` block.

    Args:
        model: As on the command line.
        count: Processes.
        threads: Of each.

    Raises:
        UserError: One of them could not begin.
    """
    command = [sys.executable, "-m", "sidestep.planning_load", model, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = [
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, text=True,
        )
        for _ in range(count)
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline().strip() != _READY:
                raise UserError(
                    f"--processes: a process that was to run {model} beside this one ended with "
                    f"code {process.wait()}, expected it to go on"
                )
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def main() -> None:
    """Generates until it is killed, or whoever has started it is gone."""
    parent = os.getppid()
    torch.set_num_threads(int(sys.argv[2]))
    pipe = load_pipeline(sys.argv[1])
    pipe.set_progress_bar_config(disable=True)
    told = False
    end = time.monotonic() + 600
    while os.getppid() == parent and time.monotonic() < end:
        pipe(["frog"] * _IMAGES, num_inference_steps=5, output_type="latent")
        if not told:
            print(_READY, flush=True)
            told = True


if __name__ == "__main__":
    main()
