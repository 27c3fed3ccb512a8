"""The fused step where this process cannot run it: Triton's interpreter, its compiler, a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
SHARED_TESTS = ["test_solver_step.py", "test_solver_step_errors.py"]
pytest.importorskip("triton", reason="Triton is not installed (Linux x86-64 only)")


def run_tests_again(*files: str, backends: str, device: str, **environment: str) -> None:
    """Runs test files in a process of its own, whose failures show in this test's message."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    variables = {"KERNEL_TEST_BACKENDS": backends, "KERNEL_TEST_DEVICE": device, **environment}
    result = subprocess.run(
        command, cwd=HERE, env=os.environ | variables, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    assert "skipped" not in result.stdout, result.stdout


def test_triton_interpreter() -> None:
    run_tests_again(*SHARED_TESTS, backends="triton", device="cpu", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    """What the ahead-of-time compiler made of each variant."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "aot_compile_solver_step.py"]
    result = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_compiled_kernels_neither_spill_nor_fuse(compiled: dict[str, dict]) -> None:
    assert len(compiled) == 6
    for name, found in compiled.items():
        assert found["resources"]["STACK"] == found["resources"]["LOCAL"] == 0, name
        assert found["resources"]["REG"] <= 192, name
        assert not found["local"] and not found["fused"] and not found["flushes_denormals"], name


@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        # A thread has 8 elements: 2 accesses of 128 bits in fp32, 1 in half precision.
        ("sm_80 R2 G2 fp16", 2 * 2 + 2, 2 * 2 + 2),
        ("sm_90 R2 G2 fp16", 2 * 2 + 2, 2 * 2 + 2),
        ("sm_100 R2 G2 fp16", 2 * 2 + 2, 2 * 2 + 2),
        ("sm_90 R2 G2 fp32", 2 * 2 + 2 * 2, 2 * 2 + 2 * 2),
        ("sm_90 R6 G3 bf16 noise", 6 * 2 + 3 + 2, 6 * 2 + 3),
    ],
)
def test_latents_move_once_in_128_bits(
    compiled: dict[str, dict], name: str, loads: int, stores: int
) -> None:
    """Registers, outputs and noise are read once, registers and model_input written once."""
    accesses = compiled[name]["accesses"]
    assert accesses["ld.global.v4.b32"] == loads
    assert accesses["st.global.v4.b32"] == stores
    narrow = {"ld.global.b32", "ld.global.b64", "ld.global.cg.b32", "st.global.b32"}
    assert set(accesses) == narrow | {"ld.global.v4.b32", "st.global.v4.b32"}
    assert accesses["st.global.b32"] == 2 + 2 + 1  # this block's sums, the row's stats, arrivals


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("backends", ["triton", "reference", "native"])
def test_on_a_gpu(backends: str) -> None:
    if backends == "native":
        from sidestep import _native

        if not _native.build_info()["cuda"].startswith("yes"):
            pytest.skip(f"native library without CUDA ({_native.build_info()['cuda']})")
    files = [*SHARED_TESTS, "test_solver_step_operator.py", "gpu_solver_step.py"]
    run_tests_again(*files, backends=backends, device="cuda")
