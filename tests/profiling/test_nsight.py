"""The Nsight scripts say what is missing, and call the tools with what they understand."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROFILING = Path(__file__).resolve().parents[2] / "profiling"
BASH = shutil.which("bash") or "bash"
TOOLS = {"nsys": "Nsight Systems", "ncu": "Nsight Compute"}


def _folder(tmp_path: Path, **programs: str) -> Path:
    """A PATH of its own: the usual little tools, and programs that are written here."""
    for tool in ("basename", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!{BASH}\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def _run(tool: str, path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "KERNELS", "COUNT")}
    return subprocess.run(
        [BASH, str(PROFILING / f"{tool}.sh"), *arguments],
        env=environment | {"PATH": str(path)} | more, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_a_missing_tool(tool: str, tmp_path: Path) -> None:
    done = _run(tool, _folder(tmp_path), "report")
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith(f"{tool}.sh: {tool} is not on PATH, install {TOOLS[tool]} (https")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_a_missing_report(tool: str, tmp_path: Path) -> None:
    done = _run(tool, _folder(tmp_path, **{tool: "exit 9"}), "--steps", "3")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{tool}.sh: expected the report to write")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("missing, why", [("nvtx", "pip install nvtx"), ("cuda", "no CUDA device")])
def test_no_ranges_or_no_gpu(tool: str, missing: str, why: str, tmp_path: Path) -> None:
    python = f'case "$2" in *{missing}*) exit 1;; esac'
    done = _run(tool, _folder(tmp_path, **{tool: "exit 9", "python": python}), "report")
    assert done.returncode == 3 and why in done.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_recorded(tool: str, tmp_path: Path) -> None:
    """The generation after the warm-up only, and the caller's options."""
    path = _folder(tmp_path, **{tool: 'printf "%s\\n" "$@"', "python": "exit 0"})
    done = _run(tool, path, "report", "--steps", "7", COUNT="3")
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()
    profiled = ["-m", "sidestep", "profile", "--nsight", "--device", "cuda", "--steps", "7"]
    assert given[-9:] == ["python", *profiled]
    if tool == "nsys":
        assert "--capture-range=cudaProfilerApi" in given and "--output=report" in given
    else:
        assert given[:2] == ["--profile-from-start", "off"] and "report" in given
        assert given[given.index("--launch-count") + 1] == "3"
