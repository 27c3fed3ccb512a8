"""Any input to the C API: a status and a sentence, no crash, no leak, no bytes out of bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import capi
import capi_sequences
import numpy as np
import pytest

from sidestep.runtime.schedules import DiscreteVP
from sidestep.runtime.solvers import find_solver

SCHEDULE = DiscreteVP.from_betas(np.linspace(0.01, 0.1, 1000) ** 2)
SECONDS = "4"


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """The build folder of the library and the fuzz targets, under sanitizers."""
    return capi.built("asan", "fuzz", "-DSIDESTEP_FUZZ=ON")


def test_null_everywhere() -> None:
    capi_sequences.null_everywhere()


def test_any_sequence_of_calls() -> None:
    capi_sequences.sequences()


def test_any_sequence_of_calls_under_sanitizers(sanitized: Path) -> None:
    runtime = capi.run("g++", "-print-file-name=libasan.so").strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python has leaks of its own
        "SIDESTEP_TEST_LIBRARY": str(sanitized / "libsidestep.so"),
    }
    script = Path(capi_sequences.__file__)
    said = capi.run(sys.executable, script, env=environment, cwd=script.parent)
    assert said.endswith("no complaint\n")


@pytest.mark.parametrize("target", ["plan", "engine"])
def test_fuzz(sanitized: Path, target: str, tmp_path: Path) -> None:
    corpus = []
    if target == "plan":
        for solver, steps in (("ddim", 2), ("sde-dpmsolver++2m", 3), ("unipc2", 4)):
            corpus.append(tmp_path / solver)
            find_solver(solver).plan(SCHEDULE, "linspace", steps).save(corpus[-1])
    command = [sanitized / f"{target}_fuzz", SECONDS, "1", *corpus]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr, done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 100


def test_a_fuzz_target_without_arguments(sanitized: Path, tmp_path: Path) -> None:
    done = subprocess.run([sanitized / "plan_fuzz"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "usage: " in done.stderr
