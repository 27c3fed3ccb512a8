"""What was built: versions, symbols, instruction sets kept apart, and the GPU's machine code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_toolkit import toolkit

from sidestep import _native

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}


def tool(name: str) -> str:
    """Returns the program's path, or skips."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def output(*command: str | Path, **environment: str) -> str:
    """Runs a command that must succeed and returns its stdout."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_build_info() -> None:
    info = _native.build_info()
    assert set(info) == {"version", "compiler", "cuda", "simd"}
    assert info["version"] == importlib.metadata.version("sidestep")
    assert info["simd"] == _native.simd()
    assert info["cuda"].startswith(("yes (", "no: "))


def test_the_extension_hides_what_it_is_made_of() -> None:
    symbols = output(tool("nm"), "-D", "--defined-only", _native.__file__)
    assert "PyInit__native" in symbols
    assert not re.findall(r"\S*(?:sidestep|cuda)\S*", symbols)


def test_the_extension_needs_neither_torch_nor_cuda() -> None:
    needed = output(tool("readelf"), "-d", _native.__file__)
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert libraries
    assert not [name for name in libraries if re.search("torch|cud|c10|python", name)]


@pytest.mark.parametrize("operator", ["solver_step", "parareal", "exit_score"])
@pytest.mark.parametrize("simd", ["avx2", "avx512"])
def test_no_function_of_one_instruction_set_can_stand_for_another(simd: str, operator: str) -> None:
    # A weak symbol compiled for AVX could be the copy that the linker keeps for every processor.
    objects = list(BUILD.rglob(f"{operator}_{simd}.cpp.o"))
    if not objects:
        pytest.skip(f"{BUILD} holds no {simd} object: not built here, or not for x86-64")
    kinds = {line.split()[-2] for line in output(tool("nm"), objects[0]).split("\n") if line}
    assert not kinds & set("WVu")


def test_the_headers_are_plain_c(tmp_path: Path) -> None:
    source = tmp_path / "program.c"
    headers = sorted((ROOT / "csrc/include/sidestep").glob("*.h"))
    assert len(headers) == 6
    lines = [f"#include <sidestep/{header.name}>" for header in headers]
    source.write_text("\n".join([*lines, "int main(void) { return 0; }\n"]))
    include = ROOT / "csrc/include"
    output(
        tool("cc"),
        "-std=c99",
        "-pedantic-errors",
        "-Werror",
        "-fsyntax-only",
        f"-I{include}",
        source,
    )


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("1", "SIDESTEP_CUDA=1 asks for the CUDA kernels, but the answer is no: no include"),
        ("maybe", 'SIDESTEP_CUDA is "maybe", expected auto, 1 or 0'),
    ],
)
def test_cuda_that_cannot_be_built_fails_loudly(choice: str, sentence: str) -> None:
    command = [tool("cmake"), "-DSIDESTEP_CUDA_PLACES=/nowhere", "-P", ROOT / "csrc/cuda.cmake"]
    for quiet in ("auto", "0"):
        output(*command, SIDESTEP_CUDA=quiet)
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "SIDESTEP_CUDA": choice}
    )
    assert done.returncode != 0
    assert sentence in re.sub(r"\s+", " ", done.stderr)


SOURCES = sorted((ROOT / "csrc/kernels/cuda").glob("*.cu"))


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files that hold the GPU's machine code: the extension, or one architecture built now."""
    if _native.build_info()["cuda"].startswith("yes"):
        return [Path(_native.__file__)]
    root = toolkit()
    if root is None:
        pytest.skip("no CUDA toolkit in CUDA_HOME, CUDA_PATH or /usr/local/cuda")
    options = ["-std=c++17", "-O3", "--fmad=false", "-cubin", "-arch=sm_80", "-Werror=all-warnings"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    built = []
    for source in SOURCES:
        cubin = tmp_path_factory.mktemp("cuda") / f"{source.stem}.sm_80.cubin"
        output(root / "bin/nvcc", *options, *includes, source, "-o", cubin)
        built.append(cubin)
    return built


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """The toolkit's cuobjdump, or the one in Triton's wheel."""
    root = toolkit()
    places = [] if root is None else [root / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    for place in places:
        if (place / "cuobjdump").exists():
            return str(place / "cuobjdump")
    pytest.skip("no cuobjdump in the CUDA toolkit or in Triton's wheel")


# Kernels of each source: the fused step in 6 R and 3 dtypes; gram in 7 V, correction in 6 R; moves
# in pieces of 16, 4, 2 and 1 bytes.
KERNELS = {
    "solver_step_kernel": 18,
    "difference_gram_kernel": 7,
    "parareal_correct_kernel": 6,
    "finish_gram_kernel": 1,
    "finish_residual_kernel": 1,
    "exit_decide_kernel": 1,
    "exit_compact_kernel": 4,
}


def dumped(cuobjdump: str, files: list[Path], *options: str) -> str:
    """What cuobjdump says of the files."""
    return "".join(output(cuobjdump, *options, file) for file in files)


def test_gpu_kernels_do_not_spill(machine_code: list[Path], cuobjdump: str) -> None:
    usage = dumped(cuobjdump, machine_code, "--dump-resource-usage")
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    kernels = re.findall(pattern, usage)
    architectures = set(re.findall(r"arch = (sm_\d+)", usage)) or {"sm_80"}
    for kernel, count in KERNELS.items():
        assert len([k for k in kernels if kernel in k[0]]) == count * len(architectures), kernel
    assert len(kernels) == sum(KERNELS.values()) * len(architectures)
    for name, registers, stack, local in kernels:
        assert int(registers) <= 128, name  # two blocks of 256 threads on every multiprocessor
        assert (stack, local) == ("0", "0"), name


def test_gpu_architectures(machine_code: list[Path], cuobjdump: str) -> None:
    if machine_code[0].suffix == ".cubin":
        pytest.skip("the extension was built without CUDA: " + _native.build_info()["cuda"])
    listed = dumped(cuobjdump, machine_code, "-lelf")
    found = set(re.findall(r"sm_\d+", listed))
    named = set(re.findall(r"\d+", _native.build_info()["cuda"]))
    assert found == {f"sm_{name}" for name in named}
    assert {"sm_80", "sm_90"} <= found <= ARCHITECTURES


def test_gpu_kernels_move_16_bytes_at_a_time(machine_code: list[Path], cuobjdump: str) -> None:
    code = dumped(cuobjdump, machine_code, "-sass", "-arch", "sm_80")
    bodies = re.split(r"Function : ", code)[1:]
    assert len(bodies) == sum(KERNELS.values())
    for body in bodies:
        name = body.split("\n", 1)[0]
        wide_loads = len(re.findall(r"LDG\.E\.128", body))
        wide_stores = len(re.findall(r"STG\.E\.128", body))
        if "finish_" not in name:
            assert "FFMA R" not in re.sub(r"FFMA R\d+, RZ", "", body), name
        size = next(map(int, re.findall(r"Li(\d)E", name)), 0)  # R or V
        if "solver_step_kernel" in name:
            pieces = 1 if "solver_step_kernelIf" in name else 2  # of one thread's fp32 elements
            # registers and noise in `pieces` loads each; three branches in one each
            assert wide_loads >= (size + 1) * pieces + 3, name
            assert wide_stores >= size * pieces + 1, name
        elif "difference_gram_kernel" in name:
            assert wide_loads == 2 * size, name
        elif "parareal_correct_kernel" in name:
            # fine, register 0 before, new and old, each read once; boundary written once
            assert (wide_loads, wide_stores) == (size + 1 + 2 * (size + 1), size), name
        elif "exit_compact_kernelI5uint4E" in name:
            # four pieces of a row that leaves and four of the one that fills its place
            assert (wide_loads, wide_stores) == (8, 8), name
