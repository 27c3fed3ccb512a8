"""What a profiler sees of the C API, and of Python: every range, by a stand-in for the profiler.

NVTX loads nvtx/injection.cpp as it would load Nsight, so the ranges are seen without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cuda_toolkit import toolkit

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/native/nvtx"
HEADER = Path("nvtx3/nvToolsExt.h")
DRIVE = """
import torch
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criterion import Course
from sidestep.runtime.stepwise import Stepwise

driver = Stepwise(Adaptive(mode="paper").criterion())
driver.begin(Course(steps=2))
for _ in range(2):
    driver.predict(lambda x: x, (torch.zeros(1, 3),), {})
    driver.observe(torch.zeros(1, 3), torch.ones(1, 3))
"""


def include() -> Path:
    """The folder that holds NVTX's header: the toolkit's, or that of torch's CUDA packages."""
    root = toolkit()
    places = [] if root is None else [root / "include"]
    places += Path(sysconfig.get_path("purelib")).glob("nvidia/*/include")
    for place in places:
        if (place / HEADER).is_file():
            return place
    pytest.skip(f"no {HEADER}, in a CUDA toolkit or in torch's packages")


def compiled(*arguments: str | Path) -> None:
    """Runs g++, or skips."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    options = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-pthread")
    folders = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", f"-I{include()}")
    command = ["g++", *options, *folders, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def injection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for a profiler."""
    target = tmp_path_factory.mktemp("nvtx") / "injection.so"
    compiled("-shared", HERE / "injection.cpp", "-ldl", "-o", target)
    return target


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The C++ host and libsidestep's CPU build in one program, with ranges and without NVTX."""
    folder = tmp_path_factory.mktemp("host")
    cmake = (ROOT / "CMakeLists.txt").read_text()
    objects = re.search(r"add_library\(sidestep_objects OBJECT(.*?)\)", cmake, re.S)
    assert objects is not None
    sources = [*objects[1].split(), "csrc/kernels/no_cuda.cpp", "csrc/graphs/no_cuda.cpp"]
    sources.append("tests/native/nvtx/host.cpp")
    sources.remove("csrc/core/profiler.cpp")
    defined = ('-DSIDESTEP_VERSION="0"', '-DSIDESTEP_CUDA_INFO="no"')
    for source in sources:
        target = folder / f"{source.replace('/', '-')}.o"
        compiled("-c", *defined, ROOT / source, "-o", target)
    built = folder / "with", folder / "without"
    for target, nvtx in zip(built, ("-DSIDESTEP_NVTX", "-USIDESTEP_NVTX"), strict=True):
        ranges = ROOT / "csrc/core/profiler.cpp"
        compiled(nvtx, ranges, *folder.glob("*.o"), "-ldl", "-o", target)
    return built


@pytest.fixture
def program(programs: tuple[Path, Path]) -> Path:
    """The one with ranges."""
    return programs[0]


def seen(injection: Path | None, log: Path, *command: str | Path) -> list[str]:
    """The ranges of the domain `sidestep` in a process, in their order."""
    told = {} if injection is None else {"NVTX_INJECTION64_PATH": str(injection)}
    environment = {**os.environ, **told, "NVTX_LOG": str(log)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    if not log.exists():
        return []
    lines = [line.partition(" ") for line in log.read_text().splitlines()]
    return [event for domain, _, event in lines if domain == "sidestep"]


def test_the_scheduler(injection: Path, program: Path, tmp_path: Path) -> None:
    """A model call is from `next` to `complete`; that of a batch nobody completed ends too."""
    assert seen(injection, tmp_path / "log", program, "scheduler") == [
        *("+next", "+model", "-next"),
        *("+next", "-next"),
        *("-model", "+complete", "-complete", "+advance", "-advance"),
        *("+next", "+model", "-next"),
        "-model",
    ]


def test_the_blocks_of_srds(injection: Path, program: Path, tmp_path: Path) -> None:
    """Fine solves overlap, end with their chains, and are not begun where only G is of use."""
    assert seen(injection, tmp_path / "log", program, "parareal") == [
        "+fine[0:4]",
        *("+form", "+fine[4:8]", "-form"),
        *("+form", "-form"),
        *("-fine[0:4]", "+form", "+fine[4:8]", "-form"),
        "-fine[4:8]",  # of the second iterate, by the limit
        "-fine[4:8]",
    ]


def test_operators(injection: Path, program: Path, tmp_path: Path) -> None:
    found = seen(injection, tmp_path / "log", program, "operators")
    assert found == ["+step", "-step"] * 2 + ["+correct", "-correct"] * 4


def test_without_a_profiler_or_without_nvtx(
    injection: Path, programs: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nothing is written, and a build that knows no NVTX does the same work."""
    program, plain = programs
    for what in ("scheduler", "parareal", "operators"):
        assert seen(None, tmp_path / "log", program, what) == []
        assert seen(injection, tmp_path / "log", plain, what) == []


def test_python(injection: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("nvtx") is None:
        pytest.skip("the package nvtx is not installed: pip install 'sidestep[profile]'")
    assert seen(injection, tmp_path / "log", sys.executable, "-c", DRIVE) == [
        *("+step/0", "+model", "-model", "-step/0", "+decide", "-decide"),
        *("+step/1", "+model", "-model", "-step/1"),
    ]
