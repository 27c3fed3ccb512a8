"""The native library as part of a process: fork, and memory it must not touch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = str(Path(__file__).resolve().parent)


def run(code: str) -> None:
    """Runs code in a process of its own, with the helper importable."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": HELPERS, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork() is used on Linux only")
def test_a_forked_child_gets_threads_of_its_own() -> None:
    run(
        """
import os
from native_problems import assert_same_bits, random_problem
from sidestep import _native

_native.set_num_threads(3)
problem = random_problem(2, dim=400_000)
first, second = problem.copy(), problem.copy()
_native.solver_step(*first.arguments())  # starts the parent's workers
child = os.fork()
if child == 0:
    _native.solver_step(*second.arguments())
    assert_same_bits(second, first)
    threads = len(os.listdir("/proc/self/task"))
    os._exit(0 if threads == 3 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect through glibc")
def test_memory_the_step_does_not_use_is_not_accessed() -> None:
    # Each register and output fills one page; what a step does not use has no access rights at all,
    # and what it only reads cannot be written: an access ends the process.
    run(
        """
import ctypes, mmap
import numpy as np
from native_problems import random_problem
from sidestep import _native

libc = ctypes.CDLL(None, use_errno=True)
memory = mmap.mmap(-1, 8 * 4096)
floats = np.frombuffer(memory, np.float32).reshape(8, 1024)
start = floats.ctypes.data

def protect(page, rights):
    assert libc.mprotect(ctypes.c_void_p(start + page * 4096), 4096, rights) == 0

problem = random_problem(1, dim=1024, registers=4, branches=2, rows=1, noise=True)
problem.registers = floats[:4][None]
problem.outputs = [floats[4][None], floats[5][None]]
problem.noise = floats[6][None]
problem.weights[:] = [[0, 1]]
problem.step[:] = 0
# x' = 2x + u; register 1 is read and kept; 2 and 3 are neither read nor written; E = x - register 1
lines = np.zeros((5, 6), np.float32)
lines[0, [0, 4]] = 2, 1
lines[[1, 2, 3], [1, 2, 3]] = 1
lines[4, [0, 1]] = 1, -1
problem.table = np.concatenate([lines.ravel(), [1]]).astype(np.float32)[None]
floats[0], floats[1], floats[5] = 1, 5, 3
protect(1, mmap.PROT_READ)
for page in (2, 3, 4, 6):
    protect(page, 0)
protect(5, mmap.PROT_READ)
_native.solver_step(*problem.arguments())
assert (floats[0] == 5).all() and problem.stats.tolist() == [[4, 4]]
"""
    )
