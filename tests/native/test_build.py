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
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def toolkit() -> Path | None:
    """Finds the CUDA toolkit as csrc/cuda.cmake does."""
    places = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    for place in places:
        if place and (Path(place) / "include/cuda_runtime.h").exists():
            return Path(place)
    return None


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


@pytest.mark.parametrize("simd", ["avx2", "avx512"])
def test_no_function_of_one_instruction_set_can_stand_for_another(simd: str) -> None:
    # A weak symbol compiled for AVX could be the copy that the linker keeps for every processor.
    objects = list(BUILD.rglob(f"solver_step_{simd}.cpp.o"))
    if not objects:
        pytest.skip(f"{BUILD} holds no {simd} object: not built here, or not for x86-64")
    kinds = {line.split()[-2] for line in output(tool("nm"), objects[0]).split("\n") if line}
    assert not kinds & set("WVu")


def test_the_headers_are_plain_c(tmp_path: Path) -> None:
    source = tmp_path / "program.c"
    source.write_text("#include <sidestep/scheduler.h>\nint main(void) { return 0; }\n")
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


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that holds the GPU's machine code: the extension, or one architecture built now."""
    if _native.build_info()["cuda"].startswith("yes"):
        return Path(_native.__file__)
    root = toolkit()
    if root is None:
        pytest.skip("no CUDA toolkit in CUDA_HOME, CUDA_PATH or /usr/local/cuda")
    cubin = tmp_path_factory.mktemp("cuda") / "solver_step.sm_80.cubin"
    options = ["-std=c++17", "-O3", "--fmad=false", "-cubin", "-arch=sm_80", "-Werror=all-warnings"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", "-DSIDESTEP_WITH_CUDA"]
    source = ROOT / "csrc/kernels/cuda/solver_step.cu"
    output(root / "bin/nvcc", *options, *includes, source, "-o", cubin)
    return cubin


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


def test_gpu_kernels_do_not_spill(machine_code: Path, cuobjdump: str) -> None:
    usage = output(cuobjdump, "--dump-resource-usage", machine_code)
    kernels = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    architectures = set(re.findall(r"arch = (sm_\d+)", usage)) or {"sm_80"}
    # R = 1..6 in three dtypes, for each architecture.
    assert len(kernels) == 18 * len(architectures)
    for registers, stack, local in kernels:
        assert int(registers) <= 128  # two blocks of 256 threads on every multiprocessor
        assert (stack, local) == ("0", "0")


def test_gpu_architectures(machine_code: Path, cuobjdump: str) -> None:
    if machine_code.suffix == ".cubin":
        pytest.skip("the extension was built without CUDA: " + _native.build_info()["cuda"])
    listed = output(cuobjdump, "-lelf", machine_code)
    found = set(re.findall(r"sm_\d+", listed))
    named = set(re.findall(r"\d+", _native.build_info()["cuda"]))
    assert found == {f"sm_{name}" for name in named}
    assert {"sm_80", "sm_90"} <= found <= ARCHITECTURES


def test_gpu_kernels_move_16_bytes_at_a_time(machine_code: Path, cuobjdump: str) -> None:
    code = output(cuobjdump, "-sass", "-arch", "sm_80", machine_code)
    bodies = re.split(r"Function : ", code)[1:]
    assert len(bodies) == 18
    for body in bodies:
        name = body.split("\n", 1)[0]
        registers = int(re.search(r"Li(\d)E", name).group(1))
        pieces = 1 if "solver_step_kernelIf" in name else 2  # of one thread's fp32 elements
        wide_loads = len(re.findall(r"LDG\.E\.128", body))
        wide_stores = len(re.findall(r"STG\.E\.128", body))
        # registers and noise in `pieces` loads each; three branches in one each
        assert wide_loads >= (registers + 1) * pieces + 3, name
        assert wide_stores >= registers * pieces + 1, name
        assert "FFMA R" not in re.sub(r"FFMA R\d+, RZ", "", body), name
