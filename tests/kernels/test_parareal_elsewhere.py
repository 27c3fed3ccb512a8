"""The parareal operators elsewhere: under Triton's interpreter and compiler, and on a GPU."""

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

SHARED_TESTS = ["test_parareal.py", "test_parareal_errors.py"]
pytest.importorskip("triton", reason="Triton is not installed (Linux x86-64 only)")


def test_triton_interpreter() -> None:
    run_tests_again(*SHARED_TESTS, backends="triton", device="cpu", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """What the ahead-of-time compiler made of each variant."""
    return compiled_ahead("aot_compile_parareal.py")


def test_compiled_kernels_neither_spill_nor_fuse(compiled: dict[str, Any]) -> None:
    assert len(compiled) == 9
    assert_neither_spills_nor_fuses(compiled, registers=128)


@pytest.mark.parametrize(
    ("name", "vectors_read", "vectors_written"),
    [
        # gram reads new and old; the correction also fine and register 0, and writes R registers.
        ("sm_80 gram V3", 2 * 3, 0),
        ("sm_90 gram V3", 2 * 3, 0),
        ("sm_100 gram V3", 2 * 3, 0),
        ("sm_90 gram V7", 2 * 7, 0),
        ("sm_80 correct R2", 2 * 3 + 2 + 1, 2),
        ("sm_90 correct R2", 2 * 3 + 2 + 1, 2),
        ("sm_100 correct R2", 2 * 3 + 2 + 1, 2),
        ("sm_90 correct R6", 2 * 7 + 6 + 1, 6),
    ],
)
def test_vectors_move_once_in_128_bits(
    compiled: dict[str, Any], name: str, vectors_read: int, vectors_written: int
) -> None:
    """A thread has 8 elements of a vector: 2 accesses of 128 bits."""
    accesses = compiled[name]["accesses"]
    assert accesses["ld.global.v4.b32"] == 2 * vectors_read
    assert accesses.get("st.global.v4.b32", 0) == 2 * vectors_written
    narrow = {"ld.global.b32", "ld.global.cg.b32", "ld.global.cg.v2.b32", "st.global.b32"}
    assert set(accesses) <= narrow | {"ld.global.v4.b32", "st.global.v4.b32"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("backends", ["triton", "reference", "native"])
def test_on_a_gpu(backends: str) -> None:
    files = [*SHARED_TESTS, "test_parareal_operator.py", "gpu_parareal.py"]
    run_tests_on_a_gpu(*files, backends=backends)
