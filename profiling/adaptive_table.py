"""Regenerates docs/results/adaptive-paper.{json,md}: the paper mode beside the plain pipeline.

    python profiling/adaptive_table.py

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

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
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


def main() -> None:
    """Runs everything; both files are brought up to date after every run."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    documents = []
    for prompts in ("novel", "trained"):
        for steps in (50, 25):
            for solver in SOLVERS:
                documents.append(measure(prompts, solver, steps))
                text = json.dumps(documents, indent=1) + "\n"
                (RESULTS / "adaptive-paper.json").write_text(text)
                (RESULTS / "adaptive-paper.md").write_text(page(documents))
                print(row(documents[-1]), flush=True)


if __name__ == "__main__":
    main()
