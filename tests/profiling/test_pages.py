"""The pages of docs/results, and what README and docs quote of them, are what their JSON says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "adaptive_page": ("adaptive", "README.md", "| DDIM, 50 | 20 | **48.5** (32.4) |"),
    "adaptive_table": ("adaptive-paper", None, None),
    "exits_page": ("exits", None, None),
    "solver_table": ("solvers", None, None),
    "srds_page": ("srds", "docs/srds.md", "| 25 | 64 novel | 1.66 |"),
}


def _run(script: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"profiling/{script}.py", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The pages and documents somewhere else, where they may be changed."""
    ignored = shutil.ignore_patterns("*.png")
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=ignored)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


@pytest.mark.parametrize("script", PAGES)
def test_a_page_says_what_its_document_says(script: str) -> None:
    done = _run(script, "--check")
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def test_a_page_is_made_somewhere_else(tmp_path: Path) -> None:
    results = ROOT / "docs/results"
    shutil.copy(results / "solvers.json", tmp_path)
    done = _run("solver_table", "--reuse", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "solvers.md").read_text() == (results / "solvers.md").read_text()
    assert (tmp_path / "solvers.png").stat().st_size > 10_000


def test_every_page_has_a_script() -> None:
    names = {name for name, _, _ in PAGES.values()}
    assert names == {page.stem for page in (ROOT / "docs/results").glob("*.md")}


@pytest.mark.parametrize("script", PAGES)
def test_a_changed_page_is_found(script: str, copy: Path) -> None:
    name, other, row = PAGES[script]
    page = copy / f"docs/results/{name}.md"
    lines = page.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if line.startswith("|"))
    page.write_text("".join([*lines[:last], "| 1 |\n", *lines[last + 1 :]]))
    changed = [f"-{line}" for line in ("| 1 |",)]
    if other is not None and row is not None:
        text = (copy / other).read_text()
        assert text.count(row) == 1
        (copy / other).write_text(text.replace(row, "| 2 |"))
        changed.append("-| 2 |")
    done = _run(script, "--check", "--root", copy)
    assert done.returncode == 1, done.stderr
    found = done.stdout.splitlines()
    for line in changed:
        assert sum(one.startswith(line) for one in found) == 1, done.stdout


def test_figures_in_the_text() -> None:
    done = _run("figures")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("20.0\ncalls of 50", "21.0\ncalls of 50", "README.md: expected 20.0 (compare.results[1]"),
        ("are 54 dB from", "are nearly as far from", "README.md: expected 54 (solvers.claim.rows"),
    ],
)
def test_a_wrong_figure_in_the_text(copy: Path, old: str, new: str, said: str) -> None:
    readme = (copy / "README.md").read_text()
    assert readme.count(old) == 1
    (copy / "README.md").write_text(readme.replace(old, new))
    done = _run("figures", "--root", copy)
    assert done.returncode == 1 and done.stdout.startswith(said), done.stdout + done.stderr
    assert done.stdout.count("expected") == 1


def test_a_document_that_was_measured_anew(copy: Path) -> None:
    """Its figures are wrong on every page that quotes it."""
    document = copy / "docs/results/compare-one-thread.json"
    text = document.read_text()
    assert text.count('"speedup": 2.274') == 1
    document.write_text(text.replace('"speedup": 2.274', '"speedup": 2.345'))
    done = _run("figures", "--root", copy)
    assert done.returncode == 1
    assert [line.split(" in: ")[0] for line in done.stdout.splitlines() if "expected" in line] == [
        "README.md: expected 2.35 (compare_one_thread.results[1].speedup:.2f)",
        "adaptive.md: expected 2.35 (compare_one_thread.results[1].speedup:.2f)",
    ]
