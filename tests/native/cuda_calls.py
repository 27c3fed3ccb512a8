"""Builds the CUDA kernels for the CPU under tests/native/cuda_shim, and runs calls of them there.

A build instruments the kernels' own sources; everything around them is compiled once, without
sanitizers. Calls are recorded in a file and run by a program of its own (replay.cpp).
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import native_parareal_problems as parareal
import native_problems as steps
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests/native/cuda_shim"
KERNELS = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
PLAIN = [
    SHIM / "fibres.cpp",
    SHIM / "replay.cpp",
    ROOT / "csrc/core/status.cpp",
    ROOT / "csrc/kernels/exit_compact_check.cpp",
    ROOT / "csrc/kernels/ranges.cpp",
    ROOT / "csrc/kernels/solver_step_check.cpp",
    ROOT / "csrc/kernels/parareal_check.cpp",
]
OPTIONS = [
    *("-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{folder}" for folder in (SHIM, ROOT / "csrc", ROOT / "csrc/include")),
]
SANITIZERS = ("address,undefined", "thread")


@functools.cache
def _fixed_addresses() -> tuple[str, ...]:
    """What starts a program at the same addresses each time, where it may be started so.

    ThreadSanitizer of gcc 12 does not start where the kernel spreads addresses over more than 28
    bits (vm.mmap_rnd_bits).
    """
    setarch = shutil.which("setarch")
    if setarch is None or subprocess.run([setarch, "-R", "true"], capture_output=True).returncode:
        return ()
    return setarch, "-R"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a program; the first report of AddressSanitizer or ThreadSanitizer ends it with 66."""
    command = (*_fixed_addresses(), *command)
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "exitcode=66",
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def compiled(folder: Path, source: Path, *options: str) -> Path:
    """Compiles one source, CUDA C++ as C++, and returns the object."""
    target = folder / f"{source.name}.o"
    done = run("g++", *OPTIONS, *options, "-x", "c++", "-c", source, "-o", target)
    assert done.returncode == 0, done.stderr
    return target


def linked(program: Path, sanitizer: str, objects: list[Path]) -> Path:
    """Links a program with a sanitizer's runtime."""
    done = run("g++", f"-fsanitize={sanitizer}", *objects, "-ldl", "-pthread", "-o", program)
    assert done.returncode == 0, done.stderr
    return program


@dataclass(frozen=True)
class Programs:
    """What one sanitizer's build gives."""

    replay: Path
    planted: Path


def build(plain: list[Path], folder: Path, sanitizer: str) -> Programs:
    """Compiles the kernels and the planted ones with a sanitizer, on top of the plain objects."""
    options = ("-O1", "-g1", f"-fsanitize={sanitizer}")
    kernels = [compiled(folder, source, *options) for source in KERNELS]
    planted = compiled(folder, SHIM / "planted.cu", *options)
    runtime = [o for o in plain if o.name in ("fibres.cpp.o", "status.cpp.o")]
    return Programs(
        linked(folder / "replay", sanitizer, [*kernels, *plain]),
        linked(folder / "planted", sanitizer, [planted, *runtime]),
    )


def build_plain(folder: Path, sources: list[Path]) -> list[Path]:
    """Compiles what is not instrumented; skips where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return [compiled(folder, source, "-O1") for source in sources]


@dataclass
class Call:
    """One call of a launcher; `replay` fills the arrays it writes."""

    operation: int  # in the order of replay.cpp
    numbers: tuple[int, ...]
    written: list[np.ndarray | None]
    read: list[np.ndarray | None]
    shifted: bool = False  # addresses are those of an element that is not the first of 16 bytes

    def encoded(self) -> bytes:
        """The call as replay.cpp reads it."""
        parts = [np.array((self.operation, *self.numbers), np.int64).tobytes()]
        for array in (*self.written, *self.read):
            if array is None:
                parts.append(np.array([-1, 0], np.int64).tobytes())
                continue
            offset = array.itemsize if self.shifted and array.itemsize < 8 else 0
            parts.append(np.array([array.nbytes, offset], np.int64).tobytes() + array.tobytes())
        return b"".join(parts)


def replay(programs: Programs, calls: list[Call], folder: Path, *mode: str) -> None:
    """Runs the calls in one process, which must report nothing, and fills what they write.

    In the mode "graph" every call is captured, and its graph launched.
    """
    recorded, results = folder / "calls", folder / "results"
    recorded.write_bytes(b"".join(call.encoded() for call in calls))
    done = run(programs.replay, recorded, results, *mode)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    data = results.read_bytes()
    for array in (array for call in calls for array in call.written if array is not None):
        array[...] = np.frombuffer(data[: array.nbytes], array.dtype).reshape(array.shape)
        data = data[array.nbytes :]
    assert not data


def step_call(problem: steps.Problem, shifted: bool = False) -> Call:
    """`solver_step` on the problem's own arrays."""
    p = problem
    slots, registers, dim = p.registers.shape
    rows = p.step.shape[0]
    return Call(
        0,
        (slots, registers, dim, len(p.outputs), p.dtype, p.table.shape[0], rows),
        [p.registers, p.model_input, p.stats],
        [*p.outputs, p.weights, p.noise, p.table, p.step, p.slot],
        shifted,
    )


def parareal_calls(problem: parareal.Problem, shifted: bool = False) -> list[Call]:
    """`difference_gram`, then `parareal_correct_`, on the problem's own arrays."""
    p = problem
    rows, registers, dim = p.boundary.shape
    correct = [p.fine, p.new, p.old, p.coefficients]
    return [
        Call(1, (rows, registers + 1, dim), [p.gram], [p.new, p.old], shifted),
        Call(2, (rows, registers, dim), [p.boundary, p.residual], correct, shifted),
    ]


def decide_call(
    score: np.ndarray, limit: np.ndarray, group: np.ndarray | None, shifted: bool = False
) -> Call:
    """`exit_decide`; it writes order [rows] and kept [1]."""
    rows = len(score)
    written = [np.full(rows, -9), np.full(1, -9)]
    return Call(3, (rows,), written, [score, limit, group], shifted)


def compact_call(
    hidden: np.ndarray,  # [rows, ...]
    out: np.ndarray,  # [places, ...] of the same dtype
    order: np.ndarray,  # [rows] int64
    kept: int,
    place: np.ndarray,  # [rows] int64
    shifted: bool = False,
) -> Call:
    """`exit_compact_` on those arrays."""
    row_bytes = hidden[:1].nbytes if len(hidden) else 0
    sizes = (len(hidden), len(out), row_bytes)
    return Call(4, sizes, [hidden, out], [order, np.array([kept]), place], shifted)
