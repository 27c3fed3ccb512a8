"""Regenerates docs/results/adaptive.{json,md,png}: every policy of reuse at equal model calls.

With the oracle also adaptive-first.png.

    python profiling/adaptive_page.py            # all of it; goes on where it was interrupted
    python profiling/adaptive_page.py --quick    # 16 prompts and the main policies
    python profiling/adaptive_page.py --reuse    # only the page and chart, from the JSON
    python profiling/adaptive_page.py --reuse --untimed    # seconds left out: a busy machine

Two processes of one thread each share the schedulers and steps; each keeps its results in
build/adaptive, or build/adaptive-quick. 250 steps are measured for DDIM and few policies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from parts import measure

from sidestep.bench import adaptive_report as report
from sidestep.bench.adaptive import SOLVERS
from sidestep.bench.documents import write

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
QUICKLY = "--quick" in sys.argv
"""Leaves out three quarters of the prompts, what decides nothing, and the 250 steps."""

PARTS = RESULTS.parent.parent / "build" / ("adaptive-quick" if QUICKLY else "adaptive")
COMMAND = ["bench", "adaptive"]
LONG = "default,paper,uniform-linear,fewer-steps"
"""Families that are measured at 250 steps."""

QUICK = "default,paper,uniform-hold,uniform-linear,zeus,sada,fewer-steps"
"""Families of the quick comparison."""

JOBS = [
    *(["--solver", s, "--steps", n] for n in ("50", "25") for s in SOLVERS),
    ["--solver", "ddim", "--steps", "250", "--policies", LONG],
]
FULL = "| policy | setting | calls | fewer calls | PSNR | 10th percentile | SSIM | wall-clock |"


def part(options: list[str]) -> tuple[Path, list[str]]:
    """The picture and the command line of one scheduler and number of steps."""
    quickly = ["--prompts", "16", "--policies", QUICK] if QUICKLY else []
    return PARTS / f"{options[1]}-{options[3]}.png", [*COMMAND, *options, *quickly]


def equal(document: dict[str, Any], solver: str, steps: int, images: int | None) -> list[str]:
    """The table at equal calls, over all images or over the oracle's."""
    columns = [f"{n} calls ({steps / n:.1f}x)" for n in report.equal_calls(steps)]
    lines = [f"| policy | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for family, cells in report.compared(document, solver, steps, images).items():
        name = f"**{family}**" if family == "default" else family
        lines.append(f"| {name} | {' | '.join(map(report.cell, cells))} |")
    return lines


def everything(document: dict[str, Any], solver: str, steps: int) -> list[str]:
    """Every setting that was measured."""
    lines = [FULL, "|---" * 8 + "|"]
    for family, results in report.by_family(document, solver, steps).items():
        for r in results:
            lines.append(
                f"| {family} | {r['setting']} | {r['calls']:.1f} | {r['ratio']:.2f}x "
                f"| {r['psnr']:.1f} | {r['psnr_p10']:.1f} | {r['ssim']:.3f} "
                f"| {report.number(r['speedup'], '.2f')} |"
            )
    return lines


def page(document: dict[str, Any]) -> str:
    """The page: targets, the tables at equal calls, and below them every setting."""
    environment = document["environment"]
    quick = " --quick" if len(document["prompts"]) < 64 else ""
    lines = [
        "# Reusing model calls: every policy at equal calls, on emoji-sd",
        "",
        f"Made by `python profiling/adaptive_page.py{quick}` (`sidestep {' '.join(COMMAND)}` for "
        f"each scheduler and number of steps): {len(document['prompts'])} novel prompts, guidance "
        f"{document['guidance']}, batch {document['batch']}, fp32; {environment['cpu']}, "
        f"OMP_NUM_THREADS={environment['threads']}, torch {environment['torch']}, diffusers "
        f"{environment['diffusers']}. PSNR and SSIM to the same scheduler run in full. The "
        "settings of a policy are in `python/sidestep/bench/adaptive_grid.py`, the policies in "
        f"`adaptive_policies.py` beside it{_oracle(document)}. {_clock(document)}",
        "",
        "![PSNR against model calls](adaptive.png)",
        "",
        *_first(document),
        "Tables: mean PSNR / 10th percentile in dB at equal calls per image, interpolated "
        "between the best settings of each policy; `-` is outside what was measured of it.",
        "",
        *(f"- {line}" for line in report.targets(document)),
        *_held_out(document),
    ]
    for solver, steps in report.settings(document):
        lines += ["", f"## {solver}, {steps} steps", "", *equal(document, solver, steps, None)]
        images = report.subset(document, solver, steps)
        if images is not None:
            lines += ["", f"The same on the first {images} prompts, with the oracle and modes:", ""]
            lines += equal(document, solver, steps, images)
        lines += ["", "<details><summary>every setting</summary>", ""]
        lines += [*everything(document, solver, steps), "", "</details>"]
    return "\n".join([*lines, ""])


def _clock(document: dict[str, Any]) -> str:
    if any(result["speedup"] is not None for result in document["results"]):
        return (
            "Only the default mode was timed in turns with the plain run: other wall-clock "
            "figures are noisy."
        )
    return "The machine had other work to do, so that no seconds are given."


def without_seconds(document: dict[str, Any]) -> dict[str, Any]:
    """The document without what a busy machine has spoilt."""
    names = ("seconds", "plain_seconds", "speedup")
    document["results"] = [r | dict.fromkeys(names) for r in document["results"]]
    return document


def _oracle(document: dict[str, Any]) -> str:
    found = any(result["policy"] == "oracle" for result in document["results"])
    return ", the oracle in `adaptive_oracle.py`" if found else ""


def _held_out(document: dict[str, Any]) -> list[str]:
    """The default at its own threshold, where nothing of it was chosen."""
    lines = report.held_out(document)
    if not lines:
        return []
    count = report.PROMPTS - len(report.CHOSEN_ON)
    return [
        "",
        f"At its own threshold, on the {count} prompts that no constant of the default mode was "
        "chosen on (all but every fourth from the third on; its network was trained on none):",
        "",
        *(f"- {line}" for line in lines),
    ]


def _first(document: dict[str, Any]) -> list[str]:
    """The chart of the first prompts, where the oracle was searched."""
    if not any(report.subset(document, *pair) for pair in report.settings(document)):
        return []
    return ["![The same on the first prompts, with oracle and modes](adaptive-first.png)", ""]


def main() -> None:
    """Measures unless told to reuse, and writes the files."""
    saved = RESULTS / "adaptive.json"
    if "--reuse" not in sys.argv[1:]:
        jobs = JOBS[:-1] if QUICKLY else JOBS
        write(measure(dict(map(part, jobs))), saved)
    document = json.loads(saved.read_text())
    if "--untimed" in sys.argv[1:]:
        write(without_seconds(document), saved)
    report.draw(document, RESULTS / "adaptive.png")
    (RESULTS / "adaptive.md").write_text(page(document))


if __name__ == "__main__":
    main()
