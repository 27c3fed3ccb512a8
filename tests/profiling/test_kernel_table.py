"""docs/kernels.md holds: the compiler, the count of diffusers' operations and the rooflines."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="Triton is not installed (Linux x86-64 only)")


def _check(page: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "profiling/kernel_table.py", "--check", "--page", str(page)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_page_holds() -> None:
    done = _check(ROOT / "docs" / "kernels.md")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_figure_is_found(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert text.count("| 2 registers, fp32 | A100 | 44 | 44 |") == 1
    page = tmp_path / "kernels.md"
    page.write_text(text.replace("fp32 | A100 | 44 | 44 |", "fp32 | A100 | 44 | 40 |"))
    done = _check(page)
    assert done.returncode == 1, done.stderr
    assert sum(line.startswith("-|") for line in done.stdout.splitlines()) == 1
    assert "| A100 | 44 | 40 |" in done.stdout and "| A100 | 44 | 44 |" in done.stdout
