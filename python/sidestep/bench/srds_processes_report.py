"""What ``sidestep bench srds --processes`` has found, in tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sidestep.bench.srds_results import Entry

COLUMNS = (
    "method", "prompts", "iterations", "calls of rank 0", "of all", "PSNR", "worst", "seconds",
    "speed-up", "planned",
)  # fmt: skip
"""Headings of the table of one prompt set, number of steps and number of processes."""

_NAMES = {"srds": "SRDS", "guidance": "guidance"}
_NUMBERS = {2: "two", 3: "three", 4: "four"}

Groups = dict[tuple[str, int, int], list[Entry]]
"""By prompt set, steps and processes."""


def groups(document: dict[str, Any]) -> Groups:
    """The results of several processes."""
    found: Groups = {}
    results = [r for r in document["results"] if r["processes"] > 1]
    for r in sorted(results, key=lambda r: (r["set"], r["steps"], r["processes"])):
        found.setdefault((r["set"], r["steps"], r["processes"]), []).append(r)
    return found


def cells(r: Entry) -> list[str]:
    """One line of the table."""
    planned = r["planner"]["predicted"]
    return [
        f"{_NAMES[r['method']]} {r['setting']}", str(r["prompts"]), f"{r['iterations']:.1f}",
        f"{r['ticks']:.1f}", f"{r['nfe']:.0f}", f"{r['psnr']:.1f}",
        f"{min(r['images']['psnr']):.1f}", f"{r['seconds']:.2f}", f"{r['speedup']:.2f}x",
        "-" if planned is None else f"{planned:.2f}x",
    ]  # fmt: skip


def verdict(results: Sequence[Entry]) -> str:
    """What the planner picks, and how the quickest run of that kind did."""
    r = results[-1]
    planner, processes = r["planner"], r["processes"]
    kind = planner["choice"]
    mine = [each["speedup"] for each in results if each["method"] == kind]
    if kind == "serial" or not mine:
        quickest = max(each["speedup"] for each in results)
        return f"the planner picks {kind}: at best {quickest:.2f}x on {processes} processes"
    holds = "holds" if max(mine) > 1 else "fails"
    return (
        f"the planner picks {kind} on {processes} processes, {planner['speedup']:.2f}x: {holds}, "
        f"{max(mine):.2f}x measured"
    )


def print_processes(document: dict[str, Any]) -> None:
    """A table and a sentence for every prompt set, number of steps and of processes."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = [i for i, name in enumerate(COLUMNS) if name not in ("prompts", "of all", "worst")]
    for (name, steps, processes), results in groups(document).items():
        title = (
            f"{name}, {steps} steps of {results[0]['solver']}, {results[0]['prompts']} prompts, "
            f"on {processes} processes"
        )
        table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i in shown:
            table.add_column(COLUMNS[i], justify="right" if i else "left")
        for r in results:
            line = cells(r)
            table.add_row(*(line[i] for i in shown))
        console.print(table)
        console.print(f"  {verdict(results)}", highlight=False)


def section(document: dict[str, Any]) -> list[str]:
    """Of the page, in Markdown; nothing without such results."""
    lines: list[str] = []
    for (name, steps, processes), results in groups(document).items():
        number = _NUMBERS.get(processes, str(processes))
        heading = f"## On {number} processes"
        if heading not in lines:
            threads = results[0]["threads"]
            lines += [
                "", heading, "",
                f"By `sidestep bench srds --processes {processes}`, one prompt at a time, with "
                f"{threads} thread{'s' * (threads > 1)} in each process. `speed-up` is against the "
                "serial sampler on one of them, `of all` the evaluations of all, `planned` what "
                "the planner predicts from model calls measured while all processes are at work. "
                "`max 1`: a single iteration, whatever is left.",
            ]  # fmt: skip
        lines += ["", f"### {name}, {steps} steps", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cells(r))} |" for r in results]
        lines += ["", f"{verdict(results)[0].upper()}{verdict(results)[1:]}."]
    return lines
