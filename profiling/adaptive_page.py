"""Regenerates docs/results/adaptive.{json,md,png}: every policy of reuse at equal model calls.

With the oracle also adaptive-first.png.

    python profiling/adaptive_page.py            # all of it; goes on where it was interrupted
    python profiling/adaptive_page.py --quick    # 16 prompts and the main policies
    python profiling/adaptive_page.py --reuse --untimed    # seconds left out: a busy machine

Its other options are in pages.py.

Two processes of one thread each share the schedulers and steps; each keeps its results in
build/adaptive, or build/adaptive-quick. 250 steps are measured for DDIM and few policies.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pages
from parts import measure

from sidestep.bench import adaptive_report as report
from sidestep.bench.adaptive import SOLVERS
from sidestep.bench.documents import write

BUILD = pages.ROOT / "build"
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


def parts(quick: bool) -> dict[Path, list[str]]:
    """The picture and the command line of every scheduler and number of steps.

    Quickly: three quarters of the prompts, what decides nothing, and the 250 steps are left out.
    """
    folder = BUILD / ("adaptive-quick" if quick else "adaptive")
    less = ["--prompts", "16", "--policies", QUICK] if quick else []
    jobs = JOBS[:-1] if quick else JOBS
    return {folder / f"{job[1]}-{job[3]}.png": [*COMMAND, *job, *less] for job in jobs}


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


SHOWN = {
    "`Adaptive()`": ("default",),
    "best fixed pattern": ("uniform-hold", "uniform-linear"),
    "ZEUS": ("zeus",),
    "SADA": ("sada",),
    "DeepCache": ("deepcache",),
    "fewer steps": ("fewer-steps",),
}
"""The columns of the README, and the families that each is the best of."""

README_CALLS = {50: 20, 25: 15, 250: 25}
SOLVER_NAMES = {"ddim": "DDIM", "euler": "Euler", "dpmsolver++": "DPM-Solver++ 2M"}


def readme(document: dict[str, Any]) -> list[str]:
    """The table of the README: every scheduler and number of steps, at one number of calls."""
    lines = [f"| solver, steps | calls | {' | '.join(SHOWN)} |", "|---" * (2 + len(SHOWN)) + "|"]
    for solver, steps in report.settings(document):
        at = report.equal_calls(steps).index(README_CALLS[steps])
        found = report.compared(document, solver, steps)
        row = []
        for families in SHOWN.values():
            cells = [found[name][at] for name in families if name in found]
            known = [cell for cell in cells if cell is not None]
            row.append(f"{max(known)[0]:.1f} ({max(known)[1]:.1f})" if known else "-")
        row[0] = "**{}** {}".format(*row[0].split())
        name = f"{SOLVER_NAMES[solver]}, {steps}"
        lines.append(f"| {name} | {README_CALLS[steps]} | {' | '.join(row)} |")
    return lines


def draw(document: dict[str, Any], folder: Path) -> None:
    """PSNR against calls, over all prompts and over the oracle's."""
    report.draw(document, folder / "adaptive.png")


def measured(folder: Path, quick: bool) -> None:
    """Leaves the document there; hours, and goes on where it was interrupted."""
    write(measure(parts(quick)), folder / "adaptive.json")


PAGE = pages.Page("adaptive", "adaptive_page", measured, page, draw, {"README.md": readme})


def main() -> None:
    """Measures unless told to reuse, and writes the files."""
    parser = pages.parser(__doc__)
    parser.add_argument("--untimed", action="store_true", help="with --reuse: without seconds")
    options = parser.parse_args()
    if options.untimed:
        saved = options.out / "adaptive.json"
        write(without_seconds(json.loads(saved.read_text())), saved)
    pages.make(PAGE, options)


if __name__ == "__main__":
    main()
