"""Regenerates docs/results/srds.{json,md} and srds*.png: SRDS against the serial sampler.

    python profiling/srds_page.py            # all of it, hours; goes on where it was interrupted
    python profiling/srds_page.py --quick    # 8 prompts, 25 and 100 steps

Its other options are in pages.py.

Two processes of one thread each share the numbers of steps and the prompt sets; each keeps its
results in build/srds, or build/srds-quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pages
from parts import measure

from sidestep.bench import srds_report as report
from sidestep.bench.documents import write
from sidestep.bench.srds import SETS, STEPS, Settings, srds_settings
from sidestep.bench.srds_picard import PUBLISHED
from sidestep.bench.srds_processes_report import section
from sidestep.bench.srds_results import GOOD, ROUNDING

BUILD = pages.ROOT / "build"
COMMAND = ["bench", "srds", "--coarse", "krylov", "--coarse", "hold"]
TOGETHER = "bench srds --processes 2 --prompts 4 --steps 25 --steps 100 --set novel --paradigms 0"
QUICK_STEPS = (25, 100)
LONG = 150
"""Steps from which on a second tolerance of ParaDiGMS is left out."""

LOOSE = 100
"""Steps from which on ParaDiGMS is compared with a tolerance above the published one too, and below
which with one under it. From there on the plain coarse solver is left out."""


def options(steps: int, quick: bool) -> list[str]:
    """What one number of steps is measured with; some is left out where it takes too long."""
    command = [*(COMMAND if steps < LOOSE or quick else COMMAND[:4]), "--paradigms", "4"]
    tolerances = ("0.1", "0.03") if steps < LOOSE else ("0.3", "0.1")
    for tolerance in tolerances if steps < LONG else (f"{PUBLISHED:g}",):
        command = [*command, "--paradigms-tolerance", tolerance]
    return [*command, "--prompts", "8"] if quick else command


def parts(quick: bool) -> dict[Path, list[str]]:
    """The picture and the command line of every number of steps and prompt set."""
    folder = BUILD / ("srds-quick" if quick else "srds")
    return {
        folder / f"{name}-{steps}.png": [
            *options(steps, quick), "--iterates", "0", "--steps", str(steps), "--set", name,
        ]
        for steps in sorted(QUICK_STEPS if quick else STEPS)
        for name in SETS
    }  # fmt: skip


def tables(document: dict[str, Any]) -> list[str]:
    """A table for every prompt set and number of steps."""
    lines = []
    for (name, steps), results in report.groups(document).items():
        lines += ["", f"## {name}, {steps} steps", ""]
        lines += [f"| {' | '.join(report.COLUMNS)} |", "|---" * len(report.COLUMNS) + "|"]
        for r in results:
            name_, *cells = report.cells(r)
            bold = f"**{name_}**" if r in report.default_entries(document) else name_
            lines.append(f"| {' | '.join([bold, *cells])} |")
    return lines


def page(document: dict[str, Any]) -> str:
    """The page: targets, pictures, and the tables."""
    environment = document["environment"]
    prompts = min(len(texts) for texts in document["prompts"].values())
    quick = " --quick" if prompts < 64 else ""
    lines = [
        "# SRDS: the serial sampler's picture in fewer sequential model calls, on emoji-sd",
        "",
        f"Made by `python profiling/srds_page.py{quick}` (`sidestep {' '.join(COMMAND)}` for each "
        f"number of steps and prompt set): {prompts} prompts of each set, novel compositions and "
        f"trained captions, or as many as the tables say, {document['solver'].upper()}, guidance "
        f"{document['guidance']}, {document['batch']} prompts at once, fp32; {environment['cpu']}, "
        f"OMP_NUM_THREADS={environment['threads']}, torch {environment['torch']}, diffusers "
        f"{environment['diffusers']}.",
        "",
        "A tick is a model call that waits for the one before it, and `N / ticks` the mean over "
        "the prompts of N by the ticks of each: what the sampler would gain on hardware on which "
        "a call for all blocks takes as long as a call for one. `calls` are all evaluations, "
        "those made ahead of time for iterations that were not needed included. PSNR is to the "
        f"serial picture; at {GOOD:g} dB the root mean square difference is "
        f"{10 ** (-GOOD / 20):.0%} of the range of a pixel. `honest`: the share of "
        f"prompts whose estimated error bounds the true one in the latents (or {ROUNDING:g}, the "
        "rounding of other batch sizes). `wall-clock` is serial / parallel on one CPU process, "
        "which has no parallel width to give: it shows the cost of the evaluations, and is as "
        "noisy as the machine was busy.",
        "",
        "ParaDiGMS (Shih et al. 2023), Picard iteration over a sliding window as wide as SRDS has "
        f"blocks, with its published tolerance of {PUBLISHED:g} and, below {LONG} steps, a "
        f"stricter one, from {LOOSE} on a looser one, each image with a window of its own; on the "
        "prompts said, evenly spaced.",
        "",
        "![N / ticks against N](srds.png)",
        "",
        *(f"- {line}" for line in report.targets(document)),
        "",
        "![Iterates beside the serial picture](srds-iterates.png)",
        "",
        "![Which step is evaluated in which tick](srds-wavefront.png)",
        *tables(document),
        *section(document),
    ]
    return "\n".join([*lines, ""])


def settings_of(document: dict[str, Any]) -> Settings:
    """The settings that a document was made with."""
    return Settings(
        model=document["model"],
        solver=document["solver"],
        prompts=max(len(texts) for texts in document["prompts"].values()),
        guidance=document["guidance"],
        seed=document["seed"],
        batch=document["batch"],
        srds=srds_settings(document["blocks"], document["tolerance"], [], []),
        peers=0,
    )


def draw(document: dict[str, Any], folder: Path) -> None:
    """The charts; the iterates are made again only where there are none."""
    picture = folder / "srds.png"
    shown = 0 if picture.with_name("srds-iterates.png").exists() else 3
    report.draw(document, settings_of(document), picture, shown)


def measured(folder: Path, quick: bool) -> None:
    """Leaves the document there; hours, and goes on where it was interrupted."""
    jobs = parts(quick)
    found = measure(jobs)
    together = next(iter(jobs)).with_name("processes-2.png")
    found["results"] += measure({together: TOGETHER.split()})["results"]  # with nothing beside it
    write(found, folder / "srds.json")
    (folder / "srds-iterates.png").unlink(missing_ok=True)


KINDS = {"novel": "novel", "trained": "trained captions"}
SHOWN = (
    "steps", "prompts", "N / ticks", "target", f"{GOOD:g} dB or more", "iterations", "worst tenth",
    "evaluations / N", "estimate honest",
)  # fmt: skip


def defaults(document: dict[str, Any]) -> list[str]:
    """The table of docs/srds.md: the default, for every number of steps and prompt set."""
    lines = [f"| {' | '.join(SHOWN)} |", "|---" * len(SHOWN) + "|"]
    for r in sorted(report.default_entries(document), key=lambda r: (r["steps"], r["set"])):
        target = report.TARGETS.get((r["set"], r["steps"]))
        lines.append(
            f"| {r['steps']} | {r['prompts']} {KINDS[r['set']]} | {r['depth']:.2f} "
            f"| {'-' if target is None else f'{target:g}'} | {r['good']:.0%} "
            f"| {r['iterations']:.1f} | {r['psnr_p10']:.1f} dB | {r['nfe'] / r['steps']:.1f} "
            f"| {r['honest']:.0%} |"
        )
    return lines


PAGE = pages.Page("srds", "srds_page", measured, page, draw, {"docs/srds.md": defaults})

if __name__ == "__main__":
    pages.make(PAGE, pages.parser(__doc__).parse_args())
