"""Regenerates docs/results/exits.{json,md,png}: early exit beside all else, on emoji-dit.

    python profiling/exits_page.py            # about an hour; goes on where it was interrupted
    python profiling/exits_page.py --quick    # 4 prompts, 10 steps

Its other options are in pages.py.

AdaDiff is in it if its model is in build/adadiff, which this makes in half an hour (the data:
`sidestep train emoji-dit --help`):

    sidestep train exits emoji-dit --mode faithful --data DATA --out build/adadiff --minutes 30
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages

from sidestep.bench import exits_report as report
from sidestep.bench.exits_grid import FAMILIES, OVERHEAD
from sidestep.report.pictures import save_figure

COMMAND = ["bench", "exits", "--prompts", "32", "--gate"]
BUDGETS = ["--threshold", "0.06", "--threshold", "0.12", "--threshold", "0.24"]
SMALL = "static,sample+adaptive,adaptive,fewer-steps,first-block-cache"
QUICKLY = ["--prompts", "4", "--subset", "4", "--steps", "10", "--batch", "4"]
ADADIFF = pages.ROOT / "build" / "adadiff"


def measured(folder: Path, quick: bool) -> None:
    """Every method at the largest batch, the better ones at smaller ones too; one thread."""
    options = [*COMMAND, *BUDGETS]
    if ADADIFF.is_dir():
        exits = str(ADADIFF / "exits.safetensors")
        options += ["--faithful-model", str(ADADIFF), "--faithful-exits", exits]
    options += ["--out", str(folder / "exits.png")]
    everything = ",".join([*FAMILIES, OVERHEAD])
    rounds = [["--batch", "32", "--methods", everything], ["--methods", SMALL]]
    for more in [[*QUICKLY, "--methods", everything]] if quick else rounds:
        command = [sys.executable, "-m", "sidestep", *options, *more]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def table(results: list[dict[str, Any]]) -> list[str]:
    """A markdown table of the results of one number of steps and batch."""
    lines = [
        "| method | setting | blocks run | times faster | PSNR, dB | worst tenth | FD-small |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if r["method"] in ("full", OVERHEAD):
            continue
        lines.append(
            f"| {r['method']} | {r['setting']} | {r['share']:.0%} "
            f"| {report.cell(r['speedup'], '.2f')} | {r['psnr']:.1f} | {r['psnr_p10']:.1f} "
            f"| {report.cell(r['fd_small'], '.2g')} |"
        )
    return lines


def page(document: dict[str, Any]) -> str:
    """The page: one table for each number of steps and batch, the gate, what is to be known."""
    environment = document["environment"]
    lines = [
        "# Early exit measured, on emoji-dit",
        "",
        f"Made by `python profiling/exits_page.py`: {len(document['prompts'])} novel prompts, "
        f"guidance {document['guidance']:g}, one thread of a CPU; torch {environment['torch']}, "
        f"diffusers {environment['diffusers']}. Everything is compared with the full model from "
        "the same noise. [What the methods are](../early-exit.md#measured-beside-everything-else).",
        "",
        "![PSNR and FD-small against blocks and seconds](exits.png)",
        "",
    ]
    for steps, batch in report.settings(document):
        rows = table(report.of(document, steps, batch))
        lines += [f"## {steps} steps, batch {batch}", "", *rows, ""]
    lines += ["## The gate, and what else", ""]
    lines += [f"- {line}" for line in (*report.notes(document), *document.get("remarks", ()))]
    return "\n".join([*lines, ""])


def draw(document: dict[str, Any], folder: Path) -> None:
    """The chart."""
    save_figure(report.chart(document), folder / "exits.png")


PAGE = pages.Page(name="exits", script="exits_page", measure=measured, text=page, draw=draw)


if __name__ == "__main__":
    pages.make(PAGE, pages.parser(__doc__).parse_args())
