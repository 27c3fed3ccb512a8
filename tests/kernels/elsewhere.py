"""Runs tests where this process cannot: under Triton's interpreter or compiler, or on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def run_tests_again(*files: str, backends: str, device: str, **environment: str) -> None:
    """Runs test files in a process of its own, whose failures show in this test's message."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    variables = {"KERNEL_TEST_BACKENDS": backends, "KERNEL_TEST_DEVICE": device, **environment}
    result = subprocess.run(
        command, cwd=HERE, env=os.environ | variables, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    assert "skipped" not in result.stdout, result.stdout


def run_tests_on_a_gpu(*files: str, backends: str) -> None:
    """The same on the GPU of this machine; skips the native backend if it was built without."""
    if backends == "native":
        from sidestep import _native

        if not _native.build_info()["cuda"].startswith("yes"):
            pytest.skip(f"native library without CUDA ({_native.build_info()['cuda']})")
    run_tests_again(*files, backends=backends, device="cuda")


def compiled_ahead(program: str) -> dict[str, Any]:
    """Runs a program that compiles kernels ahead of time, and returns the JSON it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, program]
    result = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def assert_neither_spills_nor_fuses(compiled: dict[str, Any], registers: int) -> None:
    """Of every variant, and that it needs no more registers a thread."""
    for name, found in compiled.items():
        assert found["resources"]["STACK"] == found["resources"]["LOCAL"] == 0, name
        assert found["resources"]["REG"] <= registers, name
        assert not found["local"] and not found["fused"] and not found["flushes_denormals"], name
