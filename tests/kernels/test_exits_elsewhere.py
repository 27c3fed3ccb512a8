"""The exit operators elsewhere: under Triton's interpreter and compiler, and on a GPU."""

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

SHARED_TESTS = ["test_exits.py", "test_exits_errors.py"]
pytest.importorskip("triton", reason="Triton is not installed (Linux x86-64 only)")


def test_triton_interpreter() -> None:
    run_tests_again(*SHARED_TESTS, backends="triton", device="cpu", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """What the ahead-of-time compiler made of each variant."""
    return compiled_ahead("aot_compile_exits.py")


def test_compiled_kernels_neither_spill_nor_fuse(compiled: dict[str, Any]) -> None:
    assert len(compiled) == 15
    assert_neither_spills_nor_fuses(compiled, registers=128)


@pytest.mark.parametrize(
    ("name", "bytes_of_hidden", "bytes_of_a_probe", "probes"),
    [
        # 4096 elements on 128 threads: 32 of hidden a thread, whatever the width.
        ("sm_80 score D1152 k8 bf16", 64, 64, 8),
        ("sm_90 score D1152 k8 bf16", 64, 64, 8),
        ("sm_100 score D1152 k8 bf16", 64, 64, 8),
        ("sm_90 score D8192 k8 fp16", 64, 128, 8),
        ("sm_90 score D16384 k1 fp32", 128, 128, 1),
    ],
)
def test_a_token_is_read_once_in_128_bits(
    compiled: dict[str, Any], name: str, bytes_of_hidden: int, bytes_of_a_probe: int, probes: int
) -> None:
    accesses = compiled[name]["accesses"]
    wide = (bytes_of_hidden + probes * bytes_of_a_probe) // 16
    assert accesses["ld.global.v4.b32"] == wide
    assert accesses["ld.global.b32"] == probes  # the bias
    assert accesses["st.global.b32"] == probes + 2  # a sum each; the score and the arrivals


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("sm_80 compact bf16", 2),
        ("sm_90 compact bf16", 2),
        ("sm_100 compact bf16", 2),
        ("sm_90 compact fp32", 4),
    ],
)
def test_rows_move_in_128_bits(compiled: dict[str, Any], name: str, moves: int) -> None:
    """16 elements a thread, to `out` and into a hole; and four indices."""
    accesses = compiled[name]["accesses"]
    assert accesses == {
        "ld.global.v4.b32": 2 * moves,
        "st.global.v4.b32": 2 * moves,
        "ld.global.b64": 4,
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("backends", ["triton", "reference"])
def test_on_a_gpu(backends: str) -> None:
    files = [*SHARED_TESTS, "test_exits_operator.py", "gpu_exits.py"]
    run_tests_on_a_gpu(*files, backends=backends)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_decisions_and_moves_in_cuda_cpp_on_a_gpu() -> None:
    """`exit_score` is not written in CUDA C++."""
    chosen = "decision or moves or groups or place or graph or streams"
    run_tests_on_a_gpu(*SHARED_TESTS, "gpu_exits.py", "-k", chosen, backends="native")
