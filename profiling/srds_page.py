"""Regenerates docs/results/srds.{json,md} and srds*.png: SRDS against the serial sampler.

    python profiling/srds_page.py            # all of it, hours; goes on where it was interrupted
    python profiling/srds_page.py --quick    # 8 prompts, 25 and 100 steps
    python profiling/srds_page.py --reuse    # only the page and its charts, from the JSON

Two processes of one thread each share the numbers of steps and the prompt sets; each keeps its
results in build/srds, or build/srds-quick.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from parts import measure

from sidestep.bench import srds_report as report
from sidestep.bench.documents import write
from sidestep.bench.srds import SETS, STEPS, Settings, srds_settings
from sidestep.bench.srds_picard import PUBLISHED
from sidestep.bench.srds_processes_report import section
from sidestep.bench.srds_results import GOOD, ROUNDING

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
QUICKLY = "--quick" in sys.argv[1:]
PARTS = ROOT / "build" / ("srds-quick" if QUICKLY else "srds")
COMMAND = ["bench", "srds", "--coarse", "krylov", "--coarse", "hold"]
TOGETHER = "bench srds --processes 2 --prompts 4 --steps 25 --steps 100 --set novel --paradigms 0"
COUNTS = (25, 100) if QUICKLY else STEPS
LONG = 150
"""Steps from which on a second tolerance of ParaDiGMS is left out."""

LOOSE = 100
"""Steps from which on ParaDiGMS is compared with a tolerance above the published one too, and below
which with one under it. From there on the plain coarse solver is left out."""


def options(steps: int) -> list[str]:
    """What one number of steps is measured with; some is left out where it takes too long."""
    command = [*(COMMAND if steps < LOOSE or QUICKLY else COMMAND[:4]), "--paradigms", "4"]
    tolerances = ("0.1", "0.03") if steps < LOOSE else ("0.3", "0.1")
    for tolerance in tolerances if steps < LONG else (f"{PUBLISHED:g}",):
        command = [*command, "--paradigms-tolerance", tolerance]
    return [*command, "--prompts", "8"] if QUICKLY else command


def part(steps: int, name: str) -> tuple[Path, list[str]]:
    """The picture and the command line of one number of steps and prompt set."""
    command = [*options(steps), "--iterates", "0", "--steps", str(steps), "--set", name]
    return PARTS / f"{name}-{steps}.png", command


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


def main() -> None:
    """Measures unless told to reuse, and writes the files."""
    saved = RESULTS / "srds.json"
    reuse = "--reuse" in sys.argv[1:]
    if not reuse:
        jobs = [part(steps, name) for steps in sorted(COUNTS) for name in SETS]
        found = measure(dict(jobs))
        beside = measure({PARTS / "processes-2.png": TOGETHER.split()})  # with nothing beside it
        found["results"] += beside["results"]
        write(found, saved)
    document = json.loads(saved.read_text())
    picture = RESULTS / "srds.png"
    shown = 0 if reuse and picture.with_name("srds-iterates.png").exists() else 3
    report.draw(document, settings_of(document), picture, shown)
    (RESULTS / "srds.md").write_text(page(document))


if __name__ == "__main__":
    main()
