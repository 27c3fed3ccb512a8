"""Regenerates docs/results/adaptive-paper.{json,md}: the paper mode beside the plain pipeline.

    python profiling/adaptive_table.py            # about an hour on two cores
    python profiling/adaptive_table.py --quick    # DDIM at 50 steps

Its other options are in pages.py.

DDIM, Euler and DPM-Solver++ 2M at 50 and 25 steps, on 64 novel prompts and 64 trained captions at
guidance 7.5, each by one run of ``sidestep compare --json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pages

from sidestep.runtime.files import write_whole

SOLVERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
HEADER = (
    "| prompts | solver | steps | calls | fewer calls | speed-up | PSNR | 10th percentile | SSIM |"
)


def measure(prompts: str, solver: str, steps: int) -> dict[str, Any]:
    """One run of the command line, as its JSON object."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "sidestep", "compare", "--prompts", prompts, "--solver", solver,
            "--steps", str(steps), "--method", "adaptive", "--mode", "paper", "--json",
            "--out", f"{folder}/p.png",
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    document = json.loads(done.stdout)
    document["pictures"] = []
    return {**document, "set": prompts}


def row(document: dict[str, Any]) -> str:
    """One line of the table."""
    plain, method = document["results"]
    return (
        f"| {document['set']} | {method['solver']} | {method['steps']} | {method['nfe']:.1f} "
        f"| {plain['nfe'] / method['nfe']:.2f}x | {method['speedup']:.2f}x "
        f"| {method['psnr']:.1f} | {method['psnr_p10']:.1f} | {method['ssim']:.3f} |"
    )


def page(documents: list[dict[str, Any]]) -> str:
    """The page: one line of the table per run."""
    environment = documents[0]["environment"]
    lines = [
        "# AdaptiveDiffusion, paper mode (threshold 0.01, at most 4 skips), on emoji-sd",
        "",
        f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"diffusers {environment['diffusers']}. 64 prompts, guidance 7.5, batch 16, fp32; PSNR and "
        "SSIM to the same scheduler run in full. Made by `python profiling/adaptive_table.py`.",
        "",
        HEADER,
        "|---" * 9 + "|",
        *map(row, documents),
        "",
        "Speed-ups are as noisy as the machine was busy; calls, PSNR and SSIM are not affected.",
        "",
    ]
    return "\n".join(lines)


def measured(folder: Path, quick: bool) -> None:
    """Runs everything; the document is brought up to date after every run."""
    documents = []
    for prompts in ("novel",) if quick else ("novel", "trained"):
        for steps in (50,) if quick else (50, 25):
            for solver in SOLVERS[:1] if quick else SOLVERS:
                documents.append(measure(prompts, solver, steps))
                text = json.dumps(documents, indent=1) + "\n"
                write_whole(folder / "adaptive-paper.json", text.encode())
                sys.stderr.write(row(documents[-1]) + "\n")


PAGE = pages.Page("adaptive-paper", "adaptive_table", measured, page, lambda *_: None)

if __name__ == "__main__":
    pages.make(PAGE, pages.parser(__doc__).parse_args())
