"""``sidestep bench all``: one measurement after the other, each in a process of its own.

What fails does not stop the others.  Whether results agree is for each to see to before it times
anything; one that finds they do not ends with an error, and its document is not written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sidestep
from sidestep.bench.suites import SUITES, Suite
from sidestep.errors import UserError
from sidestep.report.environment import environment
from sidestep.runtime.files import write_whole

PROFILING = Path(sidestep.__file__).resolve().parents[2] / "profiling"


def choose(names: Sequence[str]) -> list[Suite]:
    """Those that are asked for, in their order here; all without names.

    Raises:
        UserError: There is no such one, or its script is not here.
    """
    known = [suite.name for suite in SUITES]
    for name in names:
        if name not in known:
            raise UserError(f"--only: got {name}, expected one of {', '.join(known)}")
    chosen = [suite for suite in SUITES if not names or suite.name in names]
    for suite in chosen:
        if suite.script is not None and not (PROFILING / suite.script).is_file():
            raise UserError(
                f"bench all: {suite.name} needs {suite.script} in {PROFILING}, which is not there: "
                "run it in a checkout of sidestep, or choose others with --only"
            )
    return chosen


def run(
    chosen: Sequence[Suite], out: Path, quick: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measures, and returns what became of each.

    Args:
        chosen: In this order.
        out: The folder for all files.
        quick: Whether a look at whether all works is enough.
        tell: Hears a line before each and one after it.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for i, suite in enumerate(chosen):
        left = sum(minutes(other, quick) for other in chosen[i:])
        tell(
            f"{i + 1} of {len(chosen)}, {suite.name}: about {minutes(suite, quick):g} min; "
            f"{left:g} min for this and the rest"
        )
        results.append(_measure(suite, out.resolve(), quick))
        done = results[-1]
        tell(f"{suite.name}: {done['failed'] or 'done'}, {done['seconds']:.0f} s")
    return {
        "command": "bench all", "environment": environment(), "quick": quick, "out": str(out),
        "results": results,
    }  # fmt: skip


def minutes(suite: Suite, quick: bool) -> float:
    """About how long it takes."""
    return suite.quick_minutes if quick else suite.minutes


def command_of(suite: Suite, out: Path, quick: bool) -> list[str]:
    """The command line of one."""
    more = suite.quick if quick else ()
    if suite.script is None:
        return [sys.executable, "-m", "sidestep", *suite.command, *more]
    script = str(PROFILING / suite.script)
    return [sys.executable, script, *suite.command[1:], *more, "--out", str(out)]


def _measure(suite: Suite, out: Path, quick: bool) -> dict[str, Any]:
    command = command_of(suite, out, quick)
    threads = {} if suite.threads is None else {"OMP_NUM_THREADS": str(suite.threads)}
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=out, stdout=subprocess.PIPE, env={**os.environ, **threads}, text=True
    )
    seconds = time.perf_counter() - start
    document, failed = None, None
    if done.returncode:
        failed = f"exit code {done.returncode}"
    else:
        document, failed = _collect(suite, out, done.stdout)
    return {
        "name": suite.name, "command": command, "seconds": seconds, "failed": failed,
        "writes": list(suite.writes), "document": document,
    }  # fmt: skip


def _collect(suite: Suite, out: Path, printed: str) -> tuple[Any, str | None]:
    """The document, or why there is none."""
    file = out / suite.writes[0]
    try:
        if suite.prints:
            document = json.loads(printed)
            write_whole(file, (json.dumps(document, indent=1) + "\n").encode())
        else:
            document = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        return None, f"no document: {error}"
    missing = [name for name in suite.writes if not (out / name).is_file()]
    return document, f"{', '.join(missing)} not written" if missing else None
