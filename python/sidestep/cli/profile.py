"""``sidestep profile``: what one generation is made of, as a trace, a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from sidestep.cli import common
from sidestep.cli.common import Device, Dtype, Method
from sidestep.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sidestep.tracing import Trace

_SHOWN = 12  # operators
_COLOURS = {"step": "#9ca3af", "model": "#2563eb", "decide": "#f59e0b", "correct": "#dc2626"}
_FINE = "#0d9488"


def profile(
    prompts: common.Prompts = None,
    prompt_file: common.PromptFile = None,
    model: common.Model = "emoji-sd",
    method: common.MethodOption = Method.adaptive,
    solver: common.Solver = None,
    grid: common.Grid = None,
    steps: common.Steps = 10,
    guidance: common.Guidance = 7.5,
    seed: common.Seed = 0,
    mode: common.Mode = None,
    threshold: common.Threshold = None,
    blocks: common.Blocks = None,
    tolerance: common.Tolerance = None,
    iterations: common.Iterations = None,
    nsight: Annotated[
        bool,
        typer.Option(
            "--nsight",
            help="No trace: cudaProfilerStart and Stop around the generation, for nsys and ncu.",
        ),
    ] = False,
    dtype: common.DtypeOption = Dtype.float32,
    device: common.DeviceOption = Device.auto,
    out: Annotated[
        Path, typer.Option(help="The trace to write (JSON); the picture is beside it.")
    ] = Path("sidestep-trace.json"),
    as_json: common.Json = False,
) -> None:
    """Traces one generation, after a first one to warm up: operators and sidestep's own ranges.

    All prompts are one batch. Without any it is the first novel one.
    """
    from sidestep.models import load_pipeline
    from sidestep.report.environment import environment
    from sidestep.report.pictures import check_writable, save_figure
    from sidestep.sampling import Job
    from sidestep.tracing import for_nsight, trace

    common.check_run(guidance=guidance, seed=seed, steps=steps)
    texts = common.gather_prompts(prompts, prompt_file, default="novel")
    if not prompts and prompt_file is None:
        texts = texts[:1]
    if method not in (Method.adaptive, Method.srds):
        raise UserError(
            f"--method: got {method.value}, expected adaptive or srds: the plain loop has no ranges"
        )
    settings = common.method_settings(
        method, mode=mode, threshold=threshold, blocks=blocks, tolerance=tolerance,
        iterations=iterations,
    )  # fmt: skip
    if not nsight:
        check_writable(out, (".json",))
    pipe = load_pipeline(model, getattr(torch, dtype.value), device.value)
    job = Job(label=method.value, method=settings, solver=solver, grid=grid, steps=steps)
    document: dict[str, Any] = {
        "command": "profile", "environment": environment(pipe.device.type), "model": model,
        "method": method.value, "steps": steps, "batch": len(texts),
    }  # fmt: skip
    if nsight:
        summary = for_nsight(pipe, job, texts, guidance=guidance, seed=seed)
        document |= {"ticks": summary.ticks, "results": []}
        common.print_json(document) if as_json else print(summary)
        return
    found = trace(pipe, job, texts, guidance=guidance, seed=seed, out=out)
    picture = out.with_suffix(".png")
    save_figure(_chart(found, f"{method.value}, {steps} steps"), picture)
    if as_json:
        common.print_json(
            document | _results(found) | {"trace": str(out), "pictures": [str(picture)]}
        )
        return
    _print(found)
    print(f"trace: {out} (chrome://tracing or https://ui.perfetto.dev), picture: {picture}")


def _results(found: Trace) -> dict[str, Any]:
    return {
        "seconds": found.seconds, "ticks": found.summary.ticks, "nfe": list(found.summary.nfe),
        "results": [
            {"range": kind, "count": count, "milliseconds": 1000 * seconds}
            for kind, (count, seconds) in found.kinds().items()
        ],
        "operators": [
            {"name": one.name, "calls": one.calls, "cpu": one.cpu, "device": one.device}
            for one in found.operators
        ],
    }  # fmt: skip


def _print(found: Trace) -> None:
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table()
    for name in ("range", "count", "ms", "of the whole"):
        table.add_column(name, justify="left" if name == "range" else "right")
    for kind, (count, seconds) in found.kinds().items():
        table.add_row(kind, str(count), f"{1000 * seconds:.1f}", f"{seconds / found.seconds:.0%}")
    console.print(table)
    table = Table()
    for name in ("operator", "calls", "own ms on the CPU", "on the device"):
        table.add_column(name, justify="left" if name == "operator" else "right")
    for one in found.operators[:_SHOWN]:
        table.add_row(one.name, str(one.calls), f"{one.cpu:.1f}", f"{one.device:.1f}")
    console.print(table)
    console.print(f"{1000 * found.seconds:.0f} ms, {found.summary.ticks} model calls in a row")


def _chart(found: Trace, title: str) -> Figure:
    """The ranges over time, a lane each name (steps share one), and the operators' own time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lanes = dict.fromkeys(s.name if s.kind == "fine" else s.kind for s in found.spans)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 1.6 + 0.25 * max(len(lanes), _SHOWN)), layout="constrained",
        gridspec_kw={"width_ratios": [2, 1]},
    )  # fmt: skip
    for y, lane in enumerate(lanes):
        spans = [s for s in found.spans if lane in (s.kind, s.name)]
        left.broken_barh(
            [(1000 * s.start, 1000 * (s.end - s.start)) for s in spans], (y - 0.35, 0.7),
            color=_COLOURS.get(lane, _FINE), linewidth=0.8,
            edgecolor=_COLOURS.get(lane, "white"),  # a short one is seen by its edge
        )  # fmt: skip
    left.set_yticks(range(len(lanes)), list(lanes))
    left.set(title=title, xlabel="ms", xlim=(0, 1000 * found.seconds))
    shown = found.operators[:_SHOWN]
    right.barh([o.name for o in shown], [o.device or o.cpu for o in shown], color="#2563eb")
    right.set(title="operators, own time", xlabel="ms")
    for axis in (left, right):
        axis.invert_yaxis()
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
