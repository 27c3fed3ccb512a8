"""The fused step where this process cannot run it: Triton's interpreter, its compiler, a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elsewhere import (
    assert_neither_spills_nor_fuses,
    compiled_ahead,
    run_tests_again,
    run_tests_on_a_gpu,
)

SHARED_TESTS = ["test_solver_step.py", "test_solver_step_errors.py"]
pytest.importorskip("triton", reason="Triton is not installed (Linux x86-64 only)")


def test_triton_interpreter() -> None:
    run_tests_again(*SHARED_TESTS, backends="triton", device="cpu", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """What the ahead-of-time compiler made of each variant."""
    return compiled_ahead("aot_compile_solver_step.py")


def test_compiled_kernels_neither_spill_nor_fuse(compiled: dict[str, Any]) -> None:
    assert len(compiled) == 9
    assert_neither_spills_nor_fuses(compiled, registers=192)


@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        # A thread has 8 elements: 2 accesses of 128 bits in fp32, 1 in half precision.
        ("sm_80 R2 G2 fp16", 2 * 2 + 2, 2 * 2 + 2),
        ("sm_90 R2 G2 fp16", 2 * 2 + 2, 2 * 2 + 2),
        ("sm_100 R2 G2 fp16", 2 * 2 + 2, 2 * 2 + 2),
        ("sm_80 R2 G1 bf16", 2 * 2 + 1, 2 * 2 + 1),
        ("sm_90 R2 G1 bf16", 2 * 2 + 1, 2 * 2 + 1),
        ("sm_100 R2 G1 bf16", 2 * 2 + 1, 2 * 2 + 1),
        ("sm_90 R2 G2 fp32", 2 * 2 + 2 * 2, 2 * 2 + 2 * 2),
        ("sm_90 R6 G3 bf16 noise", 6 * 2 + 3 + 2, 6 * 2 + 3),
    ],
)
def test_latents_move_once_in_128_bits(
    compiled: dict[str, Any], name: str, loads: int, stores: int
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
    more = ("test_solver_step_operator.py", "test_solver_step_prepared.py", "gpu_solver_step.py")
    files = [*SHARED_TESTS, *more]
    run_tests_on_a_gpu(*files, backends=backends)
