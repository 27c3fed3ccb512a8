"""``sidestep plan``: how long model calls take here, and what SRDS would make of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from sidestep.cli import common
from sidestep.cli.common import Device, Dtype
from sidestep.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sidestep.planning import Check, Measured
    from sidestep.runtime.planner import Candidate, Decision

_REPEATS = 5  # of every measured call
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # ticks
_COLOURS = ("#1f2937", "#2563eb", "#0d9488", "#f59e0b", "#dc2626", "#7c3aed")


def plan(
    model: common.Model = "emoji-sd",
    steps: Annotated[
        list[int] | None, typer.Option(help="Steps (repeat). Default: 25 50 100.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images made together.")] = 1,
    ranks: Annotated[
        list[int] | None,
        typer.Option(
            help="Devices (repeat), each as fast as this one: processes that share one are not. "
            "Default: 1 2 4 8."
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="In place of --ranks: processes that share this device, measured while all of "
            "them are at work. With the threads of this one (OMP_NUM_THREADS)."
        ),
    ] = None,
    iterations: Annotated[
        float | None, typer.Option(help="Iterations an image is expected to need.")
    ] = None,
    width: Annotated[
        list[int] | None,
        typer.Option(help="Limits to try of an image's evaluations in a call (repeat)."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            help="Largest measured call, in lines: a guidance pair is two. Default: 32 an image."
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds for measuring.")] = 30.0,
    check: Annotated[
        bool, typer.Option("--check", help="Also run the best SRDS on one rank for real.")
    ] = False,
    guidance: common.Guidance = 7.5,
    dtype: common.DtypeOption = Dtype.float32,
    device: common.DeviceOption = Device.auto,
    out: common.Out = Path("sidestep-plan.png"),
    as_json: common.Json = False,
) -> None:
    """Predicts what SRDS gains on this device, and picks: the plain loop where nothing is gained.

    Measures model calls of growing size, simulates the schedule of every block length, and
    compares with the plain loop and, for several ranks, with the ways that need no iterations.
    """
    from sidestep.models import load_pipeline
    from sidestep.planning_load import busy
    from sidestep.report.pictures import check_writable, save_figure

    if processes is not None and ranks:
        raise UserError(f"--processes: got {processes} with --ranks, expected one of the two")
    counts, shares = steps or [25, 50, 100], ranks or [1, 2, 4, 8]
    shares = shares if processes is None else [1, processes]
    common.check_run(
        guidance=guidance, seed=0, steps=min(counts), images=images, ranks=min(shares),
        max_batch=1 if max_batch is None else max_batch, budget=budget,
        iterations=1 if iterations is None else iterations,
        width=min(width or [1]),
    )  # fmt: skip
    check_writable(out)
    pipe = load_pipeline(model, getattr(torch, dtype.value), device.value)
    measured = together = _measure(pipe, max(counts), images, max_batch, budget, guidance)
    if processes is not None and processes > 1:
        with busy(model, processes - 1, torch.get_num_threads()):
            together = _measure(pipe, max(counts), images, max_batch, budget, guidance)
        together = replace(together, alone=measured.latency)
    decisions = {
        (N, P): (together if P > 1 else measured).plan(
            N, ranks=P, iterations=iterations, widths=[None, *(width or [])]
        )
        for N in dict.fromkeys(counts)
        for P in dict.fromkeys(shares)
    }
    checks = _check(pipe, measured, decisions, guidance) if check else []
    save_figure(_chart(measured, decisions), out)
    if as_json:
        common.print_json(_document(pipe, model, measured, decisions, checks, out))
        return
    _print(measured, decisions, checks)
    print(f"chart: {out}")


Decisions = dict[tuple[int, int], "Decision"]
"""By steps and ranks."""


def _measure(
    pipe: Any, steps: int, images: int, max_batch: int | None, budget: float, guidance: float
) -> Measured:
    from sidestep.planning import LINES, measure
    from sidestep.report.progress import progress

    sizes = (max_batch or LINES * images).bit_length()
    with progress(_REPEATS * sizes, "model calls") as advance:
        return measure(
            pipe, steps, images, max_batch=max_batch, budget=budget, repeats=_REPEATS,
            on_call=advance, guidance_scale=guidance,
        )  # fmt: skip


def _best(decision: Decision) -> Candidate | None:
    """The best SRDS, chosen or not."""
    return next((one for one in decision.candidates if one.kind == "srds"), None)


def _check(pipe: Any, measured: Measured, decisions: Decisions, guidance: float) -> list[Check]:
    """Of every number of steps, on one rank."""
    from sidestep.models import load_prompts
    from sidestep.planning import check

    prompts = load_prompts("novel")[: measured.images]
    found = []
    for N in dict.fromkeys(N for N, _ in decisions):
        best = _best(decisions.get((N, 1)) or measured.plan(N))
        if best is not None:
            found.append(check(pipe, measured, best, prompt=prompts, guidance_scale=guidance))
    return found


def _document(
    pipe: Any,
    model: str,
    measured: Measured,
    decisions: Decisions,
    checks: Sequence[Check],
    out: Path,
) -> dict[str, Any]:
    from sidestep.report.environment import environment

    t1, a = measured.latency.line
    return {
        "command": "plan", "environment": environment(pipe.device.type), "model": model,
        "images": measured.images, "branches": measured.branches,
        "latency": {
            "points": [
                {"evaluations": b, "seconds": seconds} for b, seconds in measured.latency.points
            ],
            "t1": t1, "a": a,
        },
        "overhead": asdict(measured.overhead),
        "results": [
            {
                "steps": N, "ranks": P, "choice": asdict(decision.choice),
                "reason": decision.reason,
                "candidates": [asdict(one) for one in decision.candidates],
            }
            for (N, P), decision in decisions.items()
        ],
        "checks": [asdict(one) for one in checks],
        "pictures": [str(out)],
    }  # fmt: skip


def _print(measured: Measured, decisions: Decisions, checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, (t1, a) = Console(), measured.latency.line
    console.print(
        "a call with b evaluations takes about "
        f"{1000 * t1:.3g} ms x ({a:.2f} + {1 - a:.2f} b); beside it a tick takes "
        f"{1000 * measured.overhead.tick:.2g} ms"
    )
    table = Table()
    for name in ("steps", "ranks", "choice", "speed-up", "SRDS", "iterations", "calls", "speed-up"):
        table.add_column(name, justify="left" if name in ("choice", "SRDS") else "right")
    reasons: dict[str, list[str]] = {}
    for (N, P), decision in decisions.items():
        best, choice = _best(decision), decision.choice
        shown = ["none"] + [""] * 3
        if best is not None:
            shown = [f"{best.blocks} blocks", f"{best.iterations:.1f}", f"{best.ticks:.0f}",
                     f"{best.speedup:.2f}x"]  # fmt: skip
        table.add_row(str(N), str(P), choice.kind, f"{choice.speedup:.2f}x", *shown)
        where = f"{N} steps on {P} rank{'s' * (P > 1)}"
        reasons.setdefault(f"{choice.kind}: {decision.reason}", []).append(where)
    console.print(table)
    for reason, places in reasons.items():
        console.print(f"{', '.join(places)}: {reason}")
    for one in checks:
        done = ", ".join(map(str, one.iterations))
        console.print(
            f"checked: {one.steps} steps in {one.blocks} blocks, {done} iterations: "
            f"{one.speedup:.2f}x, predicted {one.predicted:.2f}x"
        )


def _chart(measured: Measured, decisions: Decisions) -> Figure:
    """Predicted speed-up against block length, a line for each rank count; the latency curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = list(dict.fromkeys(N for N, _ in decisions))
    shares = list(dict.fromkeys(P for _, P in decisions))
    figure, axes = plt.subplots(
        1, len(counts) + 1, figsize=(3.4 * (len(counts) + 1), 3.4), layout="constrained"
    )
    for axis, N in zip(axes, counts, strict=False):
        for P, colour in zip(shares, _COLOURS * len(shares), strict=False):
            _draw_candidates(axis, decisions[N, P].candidates, P, colour)
        axis.axhline(1, color="#9ca3af", linewidth=0.8, zorder=0)
        axis.set(xscale="log", title=f"{N} steps", xlabel="steps in a block", ylim=(0, None))
        low, high = axis.get_xlim()
        axis.set_xticks([m for m in _LENGTHS if low <= m <= high], minor=False)
        axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes[0].set_ylabel("predicted speed-up")
    handles = {
        label: handle for handle, label in zip(*axes[0].get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", fontsize=7,
                  ncols=len(handles), frameon=False)  # fmt: skip
    _draw_latency(axes[-1], measured)
    for axis in axes:
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_candidates(axis: Any, candidates: Sequence[Candidate], ranks: int, colour: str) -> None:
    parallel = [one for one in candidates if one.kind == "srds" and one.width is None]
    parallel.sort(key=lambda one: one.length)
    name = "1 rank" if ranks == 1 else f"{ranks} ranks"
    axis.plot([one.length for one in parallel], [one.speedup for one in parallel],
              color=colour, linewidth=1.3, marker=".", markersize=3, label=name)  # fmt: skip
    exact = [one.speedup for one in candidates if one.kind not in ("srds", "serial")]
    if exact:
        axis.axhline(max(exact), color=colour, linewidth=0.8, linestyle=":", zorder=0,
                     label="best without iterations")  # fmt: skip


def _draw_latency(axis: Any, measured: Measured) -> None:
    sizes, seconds = zip(*measured.latency.points, strict=True)
    t1, a = measured.latency.line
    axis.plot(sizes, [1000 * s for s in seconds], "o", color="#2563eb", markersize=4,
              label="measured")  # fmt: skip
    ends = [0, sizes[-1]]
    axis.plot(ends, [1000 * t1 * (a + (1 - a) * b) for b in ends], color="#f59e0b", linewidth=1.2,
              label=f"fit, a = {a:.2f}")  # fmt: skip
    axis.set(title="one model call", xlabel="evaluations", ylabel="ms", ylim=(0, None))
    axis.legend(fontsize=7, frameon=False)
