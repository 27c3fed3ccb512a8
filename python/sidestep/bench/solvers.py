"""``sidestep bench solvers``: distance to a 1000-step reference, for every solver and grid.

Each solver and grid makes the same pictures from the same noise with few model calls; the
distance is taken to one run with many steps, in latents (root mean square) and pictures (PSNR).
diffusers' own schedulers stand beside ours, compiled by `Plan.from_scheduler`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sidestep.adapters.catalogue import PEERS, named_plan, peer_scheduler
from sidestep.adapters.denoiser import GuidedDenoiser, decode, first_noise
from sidestep.metrics import latent_rms, mean_psnr, psnr
from sidestep.models import load_pipeline, load_prompts, spaced
from sidestep.report.progress import progress
from sidestep.runtime.grids import GRIDS
from sidestep.runtime.plan import Plan
from sidestep.runtime.solvers import DEFAULT_GRID, DEFAULT_SOLVER, SOLVERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = ("dpmsolver++2m", "trailing")
CLAIM = ("DPMSolver++ at 25 calls", "PNDM at 50 steps")
"""The claim DPM-Solver++ was known for: the first at least as close as the second."""

PNDM_STEPS = 50

SAME = {"euler"}
"""DDIM in other coordinates: the same latents, so it is not run twice."""


def run(
    *, model: str, prompts: int, reference_steps: int, calls: list[int], guidance: float, seed: int
) -> dict[str, Any]:
    """Measures every solver, grid and number of calls, and every peer.

    Returns:
        The JSON document: ``results`` (one entry per solver, grid and calls), ``best`` (the best
        of ours per number of calls) and ``claim``.
    """
    pipe = load_pipeline(model)
    pipe.unet.to(memory_format=torch.channels_last)
    texts = spaced(load_prompts("novel"), prompts)
    noise = first_noise(pipe, seed, len(texts))
    denoiser = GuidedDenoiser(pipe, texts, guidance)
    jobs = _jobs(pipe, calls)
    total = sum(len(plan) for *_, plan in jobs) + reference_steps
    with progress(total, "reference") as advance:
        reference_plan = named_plan(*REFERENCE, pipe.scheduler, reference_steps)
        reference = _sample(reference_plan, denoiser, noise, partial(advance, "reference"))
        pictures = decode(pipe, reference)
        results = []
        for source, solver, grid, asked, plan in jobs:
            label = f"{solver} {grid or ''} {asked}"
            latents = _sample(plan, denoiser, noise, partial(advance, label))
            decibels = psnr(decode(pipe, latents), pictures)
            results.append(
                {
                    "source": source, "solver": solver, "grid": grid, "steps": asked,
                    "nfe": len(plan), "psnr": mean_psnr(decibels),
                    "latent_rms": sum(rms := latent_rms(latents, reference)) / len(rms),
                }
            )  # fmt: skip
    return {
        "command": "bench solvers",
        "model": model,
        "prompts": texts,
        "guidance": guidance,
        "reference": f"{' '.join(REFERENCE)}, {reference_steps} calls",
        "results": results,
        "best": _best(results, calls),
        "claim": _claim(results),
    }


def _jobs(pipe: Any, calls: list[int]) -> list[tuple[str, str, str | None, int, Plan]]:
    """(source, solver, grid, calls asked for, plan), deterministic solvers only."""
    jobs: list[tuple[str, str, str | None, int, Plan]] = []
    for name in PEERS:
        for n in sorted({*calls, PNDM_STEPS}):
            plan = Plan.from_scheduler(peer_scheduler(name, pipe.scheduler.config), n)
            jobs.append(("diffusers", name, None, n, plan))
    seen: set[tuple[bytes, bytes]] = set()
    for solver in (name for name in SOLVERS if name not in SAME):
        for grid in GRIDS:
            for n in calls:
                plan = named_plan(solver, grid, pipe.scheduler, n)
                same = (plan.timesteps.tobytes(), plan.matrices.tobytes())
                if not plan.stochastic and same not in seen:  # some grids have two names
                    seen.add(same)
                    jobs.append(("sidestep", solver, grid, n, plan))
    return jobs


def _sample(
    plan: Plan, denoiser: GuidedDenoiser, noise: Tensor, advance: Callable[[], None]
) -> Tensor:
    x = noise * plan.initial_scale
    return plan.run(denoiser, x, callback=lambda _k, _x: advance())


def _best(results: list[dict[str, Any]], calls: list[int]) -> list[dict[str, Any]]:
    """The best of ours at each number of calls, by latent distance."""
    best = []
    for n in calls:
        ours = [r for r in results if r["source"] == "sidestep" and r["nfe"] <= n <= r["nfe"] + 1]
        if ours:
            best.append({"calls": n, **min(ours, key=lambda r: r["latent_rms"])})
    return best


def _claim(results: list[dict[str, Any]]) -> dict[str, Any]:
    """DPM-Solver++ at 25 calls beside PNDM at 50 steps: diffusers' own, our default, our best.

    PNDM counts with the better of its two spacings, so that its grid is not held against it.
    """

    def closest(source: str, steps: int, *names: str) -> dict[str, Any] | None:
        found = [
            r
            for r in results
            if r["source"] == source and r["steps"] == steps and r["solver"].startswith(names)
        ]
        return min(found, key=lambda r: r["latent_rms"], default=None)

    pndm = closest("diffusers", PNDM_STEPS, "PNDM")
    default = [
        r
        for r in results
        if (r["solver"], r["grid"], r["steps"]) == (DEFAULT_SOLVER, DEFAULT_GRID, 25)
    ]
    ours = {
        "diffusers, best spacing": closest("diffusers", 25, "DPMSolverMultistep"),
        "sidestep, default": default[0] if default else None,
        "sidestep, best": closest("sidestep", 25, "dpmsolver++"),
    }
    rows = {
        name: {**r, "holds": r["latent_rms"] <= pndm["latent_rms"] and r["psnr"] >= pndm["psnr"]}
        for name, r in ours.items()
        if r is not None and pndm is not None
    }
    return {"claim": f"{CLAIM[0]} at least as close as {CLAIM[1]}", "pndm": pndm, "rows": rows}


def chart(document: dict[str, Any], shown: int = 10) -> Figure:
    """PSNR against model calls: the best grid of our closest solvers, and the peers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 6.2), layout="constrained", sharey=True)
    for axis, source, title in zip(
        axes, ("sidestep", "diffusers"), ("sidestep, best grid", "diffusers' own"), strict=True
    ):
        curves = _curves([r for r in document["results"] if r["source"] == source])
        closest = sorted(curves, key=lambda solver: -curves[solver][-1][1])[:shown]
        for i, solver in enumerate(closest):
            x, y = zip(*curves[solver], strict=True)
            axis.plot(x, y, marker="o", ms=3, lw=1.2, color=plt.cm.tab10(i % 10), label=solver)
        axis.set(xlabel="model calls", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    axes[0].set_ylabel("PSNR to the reference, dB")
    figure.suptitle(f"{document['model']}, reference: {document['reference']}", fontsize=9)
    return figure


def _curves(results: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """For each solver its best PSNR at each number of calls, up to 50 calls."""
    best: dict[str, dict[int, float]] = {}
    for r in results:
        if r["nfe"] <= PNDM_STEPS + 1:
            points = best.setdefault(r["solver"], {})
            points[r["nfe"]] = max(points.get(r["nfe"], r["psnr"]), r["psnr"])
    return {solver: sorted(points.items()) for solver, points in best.items()}


def print_report(document: dict[str, Any]) -> None:
    """The ten closest at each number of calls, the peers, and the claim."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for n in sorted({r["steps"] for r in document["results"]}):
        table = Table(title=f"{n} steps")
        for column in ("solver", "grid", "calls", "latent RMS", "PSNR"):
            table.add_column(column, justify="left" if column in ("solver", "grid") else "right")
        rows = [r for r in document["results"] if r["steps"] == n]
        ours = sorted((r for r in rows if r["source"] == "sidestep"), key=lambda r: r["latent_rms"])
        for r in [*ours[:10], *(r for r in rows if r["source"] == "diffusers")]:
            table.add_row(
                r["solver"], r["grid"] or "", str(r["nfe"]), f"{r['latent_rms']:.4f}",
                f"{r['psnr']:.1f}",
            )  # fmt: skip
        console.print(table)
    pndm = document["claim"]["pndm"]
    for name, r in document["claim"]["rows"].items():
        console.print(
            f"25 calls of {r['solver']} {r['grid'] or ''} ({name}): {r['psnr']:.1f} dB, 50 steps "
            f"of {pndm['solver']}: {pndm['psnr']:.1f} dB: {'holds' if r['holds'] else 'fails'}"
        )
