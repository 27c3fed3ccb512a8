"""Regenerates docs/results/solvers.{json,md,png}: every solver and grid against a reference.

    python profiling/solver_table.py            # about 20 minutes on two cores
    python profiling/solver_table.py --quick    # one prompt, 25 calls, a reference of 100

Its other options are in pages.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages

from sidestep.bench.solvers import chart
from sidestep.report.pictures import save_figure
from sidestep.runtime.files import write_whole

COMMAND = ["bench", "solvers", "--prompts", "3"]


QUICKLY = ["--prompts", "1", "--reference-steps", "100", "--calls", "25"]


def measured(folder: Path, quick: bool) -> None:
    """One run of the command line, and its JSON object."""
    options = [*COMMAND, *(QUICKLY if quick else []), "--json"]
    command = [sys.executable, "-m", "sidestep", *options, "--out", str(folder / "solvers.png")]
    document = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    write_whole(folder / "solvers.json", (json.dumps(document, indent=1) + "\n").encode())


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A markdown table of results."""
    lines = ["| solver | grid | calls | latent RMS | PSNR |", "|---|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r['solver']} | {r['grid'] or ''} | {r['nfe']} | {r['latent_rms']:.4f} "
            f"| {r['psnr']:.1f} |"
        )
    return lines


def page(document: dict[str, Any]) -> str:
    """The page: the claim, and per number of calls the ten closest of ours and all peers."""
    environment, claim = document["environment"], document["claim"]
    lines = [
        "# Solvers and grids against a 1000-step reference, on emoji-sd",
        "",
        f"Made by `sidestep {' '.join(COMMAND)}`: {len(document['prompts'])} novel prompts, "
        f"guidance {document['guidance']}, reference: {document['reference']}; "
        f"deterministic solvers; torch {environment['torch']}, diffusers "
        f"{environment['diffusers']}. Latent RMS and PSNR "
        "are means over the prompts; grids with two names are run once.",
        "",
        "![PSNR against model calls](solvers.png)",
        "",
        f"## The claim: {claim['claim']}",
        "",
        f"PNDM, 50 steps ({claim['pndm']['solver']}): latent RMS "
        f"{claim['pndm']['latent_rms']:.4f}, {claim['pndm']['psnr']:.1f} dB.",
        "",
    ]
    for name, r in claim["rows"].items():
        lines.append(
            f"- {name}: {r['solver']} {r['grid'] or ''} at 25 calls: latent RMS "
            f"{r['latent_rms']:.4f}, {r['psnr']:.1f} dB: **{'holds' if r['holds'] else 'fails'}**"
        )
    for n in sorted({r["steps"] for r in document["results"]}):
        rows = [r for r in document["results"] if r["steps"] == n]
        ours = [r for r in rows if r["source"] == "sidestep" and r["nfe"] <= n]
        ours.sort(key=lambda r: r["latent_rms"])
        lines += ["", f"## {n} steps", ""]
        lines += table([*ours[:10], *(r for r in rows if r["source"] == "diffusers")])
    return "\n".join([*lines, ""])


def draw(document: dict[str, Any], folder: Path) -> None:
    """PSNR against model calls."""
    save_figure(chart(document), folder / "solvers.png")


PAGE = pages.Page("solvers", "solver_table", measured, page, draw)

if __name__ == "__main__":
    pages.make(PAGE, pages.parser(__doc__).parse_args())
