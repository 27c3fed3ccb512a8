"""libsidestep for C programs: built once per machine by CMake, and its structs for ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char, c_char_p, c_double, c_float, c_int32, c_int64
from ctypes import c_void_p as pointer
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
OK, INVALID, UNAVAILABLE, FAILED, FULL = range(5)
FLOAT32, FLOAT16, BFLOAT16 = range(3)
CPU, CUDA = range(2)
DONE, CANCELLED, FAILED_REQUEST = range(3)


def tool(name: str) -> str:
    """The program of this environment, or of this machine."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found is not None, f"{name} is not installed: pip install -e '.[test]'"
    return found


def run(*command: str | Path, **settings: Any) -> str:
    """Runs a command that must succeed and returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **settings)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def configured(name: str, *options: str) -> Path:
    """A build folder of the checkout, which later runs take up again."""
    folder = ROOT / "build" / name
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    command = [tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", ninja]
    environment = {**os.environ, "SIDESTEP_CUDA": "0"}
    run(*command, "-DSIDESTEP_TESTS=OFF", *options, env=environment)
    return folder


def built(name: str, target: str, *options: str) -> Path:
    """The build folder, once it holds the target."""
    folder = configured(name, *options)
    run(tool("cmake"), "--build", folder, "--target", target, "-j2")
    return folder


class PlanInfo(Structure):
    _fields_ = (
        ("name", c_char_p),
        ("digest", c_char_p),
        ("initial_scale", c_double),
        ("steps", c_int64),
        ("num_registers", c_int32),
        ("noise_columns", c_int32),
        ("stochastic", c_int32),
    )


class Options(Structure):
    _fields_ = (
        ("dim", c_int64),
        ("capacity", c_int64),
        ("queue", c_int64),
        ("buckets", POINTER(c_int64)),
        ("num_buckets", c_int64),
        ("table_steps", c_int64),
        ("num_registers", c_int32),
        ("num_branches", c_int32),
        ("dtype", c_int32),
        ("device", c_int32),
        ("skips", c_int32),
        ("memory", pointer),
        ("memory_bytes", c_int64),
    )


class Request(Structure):
    _fields_ = (
        ("plan", pointer),
        ("latents", pointer),
        ("noise", pointer),
        ("guidance", pointer),
        ("guidance_steps", c_int64),
        ("rows", c_int64),
        ("dim", c_int64),
        ("group", c_int64),
        ("branches", c_int32),
        ("max_skip", c_int32),
        ("skip_threshold", c_float),
        ("tag", pointer),
    )


class Entry(Structure):
    _fields_ = (
        ("tag", pointer),
        ("request", c_int64),
        ("row", c_int64),
        ("branch", c_int64),
        ("step", c_int64),
        ("time", c_double),
    )


class Call(Structure):
    _fields_ = (
        ("x", pointer),
        ("t", pointer),
        ("entries", POINTER(Entry)),
        ("room", c_int64),
        ("size", c_int64),
        ("num_entries", c_int64),
        ("ticket", c_int64),
    )


class Result(Structure):
    _fields_ = (
        ("tag", pointer),
        ("request", c_int64),
        ("calls", c_int64),
        ("evaluations", c_int64),
        ("outcome", c_int32),
        ("error", c_char * 220),
    )


class Counts(Structure):
    _fields_ = tuple(
        (name, c_int64)
        for name in (
            "waiting", "running", "free", "ready", "in_flight",
            "submitted", "done", "cancelled", "failed", "extensions",
        )
    )  # fmt: skip


_POINTERS = {
    "plan_load": (c_char_p, POINTER(pointer)),
    "plan_read": (c_char_p, c_int64, POINTER(pointer)),
    "plan_describe": (pointer, POINTER(PlanInfo)),
    "plan_calls": (pointer, POINTER(c_double), POINTER(c_double)),
    "engine_memory": (POINTER(Options), POINTER(c_int64)),
    "engine_create": (POINTER(Options), POINTER(pointer)),
    "engine_submit": (pointer, POINTER(Request), POINTER(c_int64)),
    "engine_next": (pointer, POINTER(Call), pointer),
    "engine_complete": (pointer, c_int64, pointer, c_int64, pointer),
    "engine_fail": (pointer, c_int64, c_char_p),
    "engine_cancel": (pointer, c_int64, POINTER(c_int32)),
    "engine_result": (pointer, POINTER(Result), POINTER(c_int32)),
    "engine_count": (pointer, POINTER(Counts)),
}


@functools.cache
def library() -> ctypes.CDLL:
    """libsidestep with the types of its functions."""
    place = os.environ.get("SIDESTEP_TEST_LIBRARY")
    loaded = ctypes.CDLL(place or str(built("capi", "sidestep") / "libsidestep.so"))
    for name, types in _POINTERS.items():
        function = getattr(loaded, f"sidestep_{name}")
        function.argtypes, function.restype = types, c_int32
    loaded.sidestep_error.restype = c_char_p
    for name in ("plan_destroy", "engine_destroy"):
        function = getattr(loaded, f"sidestep_{name}")
        function.argtypes, function.restype = (pointer,), None
    return loaded


def call(name: str, *arguments: Any) -> int:
    """The status of a function, which has said why where it is not OK."""
    status = getattr(library(), f"sidestep_{name}")(*arguments)
    assert status in range(5)
    assert status == OK or error(), f"{name} failed without a sentence"
    return status


def must(name: str, *arguments: Any) -> None:
    """Calls a function that must succeed."""
    assert call(name, *arguments) == OK, error()


def error() -> str:
    """What the last failed call of this thread said."""
    return library().sidestep_error().decode()


def address(array: np.ndarray | None) -> int | None:
    """Of an array's first element."""
    return None if array is None else array.ctypes.data


def load(path: Path) -> pointer:
    """A plan from its file."""
    plan = pointer()
    must("plan_load", str(path).encode(), ctypes.byref(plan))
    return plan


def options(dim: int, buckets: Sequence[int] = (1, 2, 4, 8), **settings: Any) -> Options:
    """Options of a small engine; they hold on to their buckets."""
    sizes = (c_int64 * len(buckets))(*buckets)
    defaults = {
        "dim": dim, "capacity": 4, "queue": 8, "num_buckets": len(buckets), "table_steps": 400,
        "num_registers": 4, "num_branches": 2,
    }  # fmt: skip
    made = Options(**{**defaults, "buckets": sizes, **settings})
    made.kept = sizes
    return made


class Engine:
    """An engine on the CPU, driven as a C program would."""

    def __init__(self, settings: Options) -> None:
        """Makes it, with buffers for its calls."""
        self.settings, self.handle = settings, pointer()
        must("engine_create", ctypes.byref(settings), ctypes.byref(self.handle))
        room = settings.buckets[settings.num_buckets - 1]
        dtype = np.float32 if settings.dtype == FLOAT32 else np.uint16
        self.x = np.zeros((room, settings.dim), dtype)
        self.t = np.zeros(room, np.float32)
        self.entries = (Entry * room)()
        self.held: dict[int, tuple] = {}

    def submit(
        self,
        plan: pointer,
        latents: np.ndarray,  # [rows, D] fp32
        guidance: Sequence[float] = (1.0,),
        noise: np.ndarray | None = None,  # [K, J, rows, D] fp32
        **settings: Any,
    ) -> int:
        """Queues a request whose result will be in ``latents``."""
        weights = np.ascontiguousarray(guidance, np.float32)
        steps, branches = weights.shape if weights.ndim == 2 else (1, len(weights))
        request = Request(
            plan=plan, latents=address(latents), noise=address(noise), guidance=address(weights),
            guidance_steps=steps, branches=branches, rows=len(latents), dim=latents.shape[1],
            **settings,
        )  # fmt: skip
        id = c_int64(-1)
        must("engine_submit", self.handle, ctypes.byref(request), ctypes.byref(id))
        self.held[id.value] = latents, noise
        return id.value

    def next(self) -> Call:
        """The next model call; its size is 0 when there is none."""
        made = Call(address(self.x), address(self.t), self.entries, len(self.entries))
        must("engine_next", self.handle, ctypes.byref(made), None)
        return made

    def complete(self, made: Call, outputs: np.ndarray) -> None:
        """Hands the outputs of a call in."""
        outputs = np.ascontiguousarray(outputs)
        must("engine_complete", self.handle, made.ticket, address(outputs), made.size, None)

    def results(self) -> list[Result]:
        """The requests that have ended."""
        ended = []
        while True:
            result, any_ = Result(), c_int32()
            must("engine_result", self.handle, ctypes.byref(result), ctypes.byref(any_))
            if not any_.value:
                return ended
            ended.append(result)

    def counts(self) -> dict[str, int]:
        """Of the scheduler."""
        counts = Counts()
        must("engine_count", self.handle, ctypes.byref(counts))
        return {name: getattr(counts, name) for name, _ in Counts._fields_}

    def destroy(self) -> None:
        """Ends it."""
        library().sidestep_engine_destroy(self.handle)
