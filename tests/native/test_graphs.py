"""The graph executor (csrc/graphs) at work on a model of a few lines: cuda_shim/graphs.cu.

The same program runs on the CPU under sanitizers, with the shim in the place of CUDA's runtime, and
on a GPU.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import cuda_calls
import pytest
import torch
from cuda_calls import ROOT, SHIM, compiled, linked, run
from cuda_toolkit import toolkit

GRAPHS = [
    *(ROOT / "csrc/graphs" / f"{name}.cpp" for name in ("graph", "graph_cache", "graphs_c_api")),
    ROOT / "csrc/graphs/tick.cpp",
    ROOT / "csrc/kernels/cuda/solver_step.cu",
    SHIM / "graphs.cu",
    SHIM / "graphs_rows.cu",
]
PLAIN = [
    *(
        ROOT / "csrc/core" / f"{name}.cpp"
        for name in ("guarded", "profiler", "row_scheduler", "status")
    ),
    ROOT / "csrc/core/scheduler_c_api.cpp",
    ROOT / "csrc/kernels/ranges.cpp",
    ROOT / "csrc/kernels/solver_step_check.cpp",
]
SCENARIOS = re.findall(r'^    \{"([\w-]+)", ', (SHIM / "graphs.cu").read_text(), re.MULTILINE)


def test_all_scenarios_are_found() -> None:
    assert len(SCENARIOS) == len(set(SCENARIOS)) == 14


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What is compiled without sanitizers."""
    sources = [SHIM / "fibres.cpp", *PLAIN]
    return cuda_calls.build_plain(tmp_path_factory.mktemp("plain"), sources)


@pytest.fixture(scope="module", params=cuda_calls.SANITIZERS)
def on_the_cpu(
    request: pytest.FixtureRequest, plain: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The program with one sanitizer after the other."""
    folder, options = tmp_path_factory.mktemp("graphs"), ("-O1", "-g1")
    sanitizer = f"-fsanitize={request.param}"
    objects = [compiled(folder, source, *options, sanitizer) for source in GRAPHS]
    return linked(folder / "graphs", request.param, [*objects, *plain])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_the_cpu(on_the_cpu: Path, scenario: str) -> None:
    done = run(on_the_cpu, scenario)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_page_compiles(tmp_path: Path) -> None:
    page = (ROOT / "docs/cuda.md").read_text()
    source = tmp_path / "page.cpp"
    source.write_text("\n".join(re.findall(r"```cpp\n(.*?)```", page, re.DOTALL)))
    assert "sidestep_graphs_run" in source.read_text()
    assert compiled(tmp_path, source).exists()


def nvcc(*options: str | Path) -> None:
    """Runs the CUDA compiler as CMakeLists.txt does, warnings being errors; skips without one."""
    root = toolkit()
    if root is None:
        pytest.skip("no CUDA toolkit in CUDA_HOME, CUDA_PATH or /usr/local/cuda")
    warnings = ("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra")
    includes = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}")
    command = (root / "bin/nvcc", "-std=c++17", "-O2", "--fmad=false", *warnings, *includes)
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "source", [s for s in GRAPHS if "kernels" not in s.parts], ids=lambda source: source.name
)
def test_compiles_for_a_gpu(source: Path, tmp_path: Path) -> None:
    """With the real headers; test_build.py does so with the kernels."""
    architectures = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)]
    nvcc(*architectures, "-c", source, "-o", tmp_path / "object.o")


@pytest.fixture(scope="module")
def on_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program for the GPU of this machine."""
    program = tmp_path_factory.mktemp("gpu") / "graphs"
    nvcc("-arch=native", "-cudart=static", *GRAPHS, *PLAIN, "-o", program)
    return program


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_a_gpu(on_a_gpu: Path, scenario: str) -> None:
    done = subprocess.run([on_a_gpu, scenario], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
