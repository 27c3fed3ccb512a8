"""The CUDA kernels compile for every architecture without a warning, a spill or local memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from cuda_toolkit import toolkit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))
REGISTERS = 128  # two blocks of 256 threads on every multiprocessor
OPTIONS = [
    *("-std=c++17", "-O3", "--fmad=false", "-cubin", "-Xptxas=-v,-warn-spills"),
    *("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"),
    *(f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include")),
]
KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


def test_there_are_kernels() -> None:
    assert {"exit_compact", "parareal", "solver_step"} == {source.stem for source in SOURCES}


def compiled(source: Path, architecture: str, folder: Path, *more: str) -> tuple[int, str]:
    """nvcc's exit code, and what it and ptxas say."""
    root = toolkit()
    if root is None or not (root / "bin/nvcc").is_file():
        pytest.skip("no CUDA toolkit in CUDA_HOME, CUDA_PATH or /usr/local/cuda")
    options = [*OPTIONS, *more, f"-arch={architecture}", source, "-o", folder / "kernels.cubin"]
    done = subprocess.run([root / "bin/nvcc", *options], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_nvcc_has_nothing_to_say(source: Path, architecture: str, tmp_path: Path) -> None:
    code, said = compiled(source, architecture, tmp_path)
    assert code == 0 and "warning" not in said, said
    kernels = KERNEL.findall(said)
    assert len(kernels) == said.count("Compiling entry function") > 0
    for name, *numbers, registers in kernels:
        assert numbers == ["0", "0", "0"], name
        assert int(registers) <= REGISTERS, name


# 64 values a thread, live across a barrier, where 32 registers are all there are.
SPILLS = """
__global__ void __launch_bounds__(1024, 2) planted(float* x) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[63 - i];
}
"""


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "planted.cu"
    source.write_text(SPILLS)
    code, said = compiled(source, "sm_80", tmp_path)
    ((name, _, stores, loads, _),) = KERNEL.findall(said)
    assert "planted" in name and int(stores) > 0 and int(loads) > 0
    assert code != 0 and "Registers are spilled to local memory" in said
