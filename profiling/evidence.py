"""Regenerates every piece of evidence about the GPU code, without a GPU, and fails if one is gone.

    python profiling/evidence.py                  # all, a table at the end
    python profiling/evidence.py --list           # what there is
    python profiling/evidence.py --only nvcc      # one (repeat)
    python profiling/evidence.py --json           # one object on stdout, the environment with it

A piece is a selection of tests.  It holds if some of them pass, none fails, and none is skipped for
another reason than it may be: evidence that could not be looked at is none.  The tests marked `gpu`
are a piece too; on a machine with a GPU they run, and have to pass.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sidestep.report.environment import environment

ROOT = Path(__file__).resolve().parent.parent
# `python -m pytest` would make the folders of the root importable.
PYTEST = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"
OPTIONS = ("-q", "-p", "no:cacheprovider", "-m")


@dataclass(frozen=True)
class Piece:
    """Some tests, and what they show.

    Attributes:
        name: A short one, for --only.
        shows: What holds if they pass.
        files: Of tests, patterns from the root.
        keyword: pytest's -k.
        marked: pytest's -m.
        may_skip: The reason, as a regular expression, for which a test may be skipped.
        may_skip_all: Whether all of them may.
    """

    name: str
    shows: str
    files: tuple[str, ...]
    keyword: str = ""
    marked: str = "not gpu"
    may_skip: str | None = None
    may_skip_all: bool = False


ELSEWHERE = ("tests/kernels/test_*_elsewhere.py",)
PIECES = (
    Piece(
        "operators",
        "every operator on the CPU equals its plain-torch reference; schemas, fake tensors, errors",
        ("tests/kernels/test_*.py",), "not elsewhere",
    ),
    Piece(
        "interpreter",
        "every Triton kernel under Triton's interpreter equals the reference",
        ELSEWHERE, "interpreter",
    ),
    Piece(
        "compiled",
        "Triton kernels for sm_80, sm_90, sm_100: 128-bit accesses, no spills, registers, the "
        "bytes an element of the roofline",
        ELSEWHERE, "not interpreter",
    ),
    Piece(
        "kernel-table",
        "docs/kernels.md is what the compiler, diffusers' step and the rooflines give",
        ("tests/profiling/test_kernel_table.py",),
    ),
    Piece(
        "nvcc",
        "the CUDA kernels for sm_80, sm_90, sm_100: no warning, no spill, no local memory",
        ("tests/native/test_nvcc.py",),
    ),
    Piece(
        "machine-code",
        "what was built: architectures, 128-bit accesses, nothing contracted, hidden symbols",
        ("tests/native/test_build.py",),
    ),
    Piece(
        "shim",
        "the CUDA sources on the CPU equal transcriptions, under AddressSanitizer, "
        "UndefinedBehaviorSanitizer and ThreadSanitizer; planted faults are found",
        ("tests/native/test_*shim*.py", "tests/native/test_*graph*.py"),
    ),
    Piece(
        "graphs",
        "CUDA graphs over a fake device layer: capture, cache hit, invalidation, failure, bounds",
        ("tests/runtime/test_graphs*.py", "tests/python/test_trajectory_graphs*.py"),
    ),
    Piece(
        "ranges",
        "NVTX ranges of C++ and Python, seen through NVTX's own injection; nothing without it",
        ("tests/native/test_nvtx.py", "tests/runtime/test_ranges.py"),
        may_skip="the package nvtx is not installed",
    ),
    Piece(
        "profiling",
        "trace, replay, roofline and the Nsight scripts do what docs/profiling.md says",
        (
            "tests/profiling/test_nsight.py", "tests/profiling/test_replay.py",
            "tests/profiling/test_roofline.py", "tests/python/test_profile.py",
            "tests/test_docs.py",
        ),
        "not (plans or methods or calibration or engine or sample)",
    ),
    Piece(
        "gpu",
        "what can only run on a GPU is complete, and is skipped with a reason elsewhere",
        ("tests",), marked="gpu",
        may_skip="no CUDA device", may_skip_all=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a piece; `problem` is why it does not hold."""

    piece: Piece
    passed: int
    skipped: tuple[str, ...]  # reasons
    problem: str | None
    seconds: float

    def __str__(self) -> str:
        counts = [f"{self.passed} passed"] * bool(self.passed)
        if self.skipped:
            reasons = "; ".join(sorted(set(self.skipped)))
            counts.append(f"{len(self.skipped)} skipped ({reasons})")
        return ", ".join([f"**{self.problem}**"] * bool(self.problem) + counts)


def command(piece: Piece, root: Path = ROOT) -> list[str]:
    """The tests of a piece, as a command.

    Raises:
        FileNotFoundError: There are none.
    """
    files = [str(file) for pattern in piece.files for file in sorted(root.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"{piece.name}: no file is {' or '.join(piece.files)}")
    keyword = ("-k", piece.keyword) if piece.keyword else ()
    return [sys.executable, "-c", PYTEST, *OPTIONS, piece.marked, *keyword, *files]


def look(piece: Piece, root: Path = ROOT) -> Outcome:
    """Runs its tests, in a process of its own; what fails is said on stderr."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [*command(piece, root), f"--junitxml={report}"],
            cwd=root, capture_output=True, text=True,
        )  # fmt: skip
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    skips = [skip.get("message") or "" for case in cases for skip in case.iter("skipped")]
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    passed = len(cases) - len(skips) - bad
    problem = _problem(piece, done.returncode, passed, bad, skips)
    if problem is not None:
        sys.stderr.write(done.stdout[-8000:] + done.stderr[-2000:])
    return Outcome(piece, passed, tuple(skips), problem, time.perf_counter() - start)


def _problem(piece: Piece, code: int, passed: int, bad: int, skips: Sequence[str]) -> str | None:
    if bad:
        return f"{bad} failed"
    if code:
        return "no tests were found" if code == 5 else f"pytest ended with {code}"
    allowed = piece.may_skip
    others = [reason for reason in skips if allowed is None or not re.search(allowed, reason)]
    if others:
        return f"{len(others)} could not be looked at"
    if not passed and not piece.may_skip_all:
        return "nothing was looked at"
    return None


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """The report."""
    lines = ["| evidence | what it shows | result | seconds |", "|---" * 4 + "|"]
    for one in outcomes:
        lines.append(f"| {one.piece.name} | {one.piece.shows} | {one} | {one.seconds:.0f} |")
    return lines


def document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The report as JSON."""
    results = [
        {
            "name": one.piece.name, "shows": one.piece.shows, "command": command(one.piece),
            "holds": one.problem is None, "problem": one.problem, "passed": one.passed,
            "skipped": list(one.skipped), "seconds": one.seconds,
        }
        for one in outcomes
    ]  # fmt: skip
    return {"command": "evidence", "environment": environment(), "results": results}


def main(arguments: Sequence[str] | None = None) -> None:
    """Looks at all that is asked for; exits 1 if a piece does not hold."""
    parser = argparse.ArgumentParser(description="Evidence about the GPU code, without a GPU.")
    names = [piece.name for piece in PIECES]
    parser.add_argument("--only", action="append", choices=names, help="repeat; default: all")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args(arguments)
    chosen = [piece for piece in PIECES if options.only is None or piece.name in options.only]
    if options.list:
        print(*(f"{piece.name}: {piece.shows}" for piece in chosen), sep="\n")
        return
    outcomes = []
    for i, piece in enumerate(chosen):
        sys.stderr.write(f"evidence: {i + 1} of {len(chosen)}, {piece.name}\n")
        outcomes.append(look(piece))
    print(json.dumps(document(outcomes), indent=1) if options.json else "\n".join(table(outcomes)))
    gone = [one.piece.name for one in outcomes if one.problem is not None]
    if gone:
        sys.stderr.write(f"evidence: {', '.join(gone)} of {len(chosen)} pieces do not hold\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
