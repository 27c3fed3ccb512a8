"""``sidestep compare``: methods side by side from the same noise, with numbers and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sidestep.cli import common
from sidestep.cli.common import Device, Dtype, Method

if TYPE_CHECKING:
    from sidestep.sampling import Run


def compare(
    prompts: common.Prompts = None,
    prompt_file: common.PromptFile = None,
    model: common.Model = "emoji-sd",
    method: common.MethodOption = Method.adaptive,
    solver: common.Solver = None,
    grid: common.Grid = None,
    steps: common.Steps = 50,
    against: common.Against = None,
    against_steps: common.AgainstSteps = None,
    guidance: common.Guidance = 7.5,
    seed: common.Seed = 0,
    batch: common.Batch = 16,
    mode: common.Mode = None,
    threshold: common.Threshold = None,
    max_skip: common.MaxSkip = None,
    calibration: common.CalibrationFile = None,
    blocks: common.Blocks = None,
    tolerance: common.Tolerance = None,
    iterations: common.Iterations = None,
    exits: common.Exits = None,
    dtype: common.DtypeOption = Dtype.float32,
    device: common.DeviceOption = Device.auto,
    out: common.Out = Path("sidestep-compare.png"),
    as_json: common.Json = False,
) -> None:
    """Compares a method with the plain pipeline: calls, seconds, PSNR, SSIM, and a picture.

    The plain pipeline runs the same solver and steps, unless --against says otherwise.
    Without prompts the 64 novel prompts of the bundled model are used.
    """
    from sidestep.models import load_pipeline
    from sidestep.report.environment import environment
    from sidestep.report.pictures import check_writable
    from sidestep.sampling import Job

    baseline_steps = steps if against_steps is None else against_steps
    common.check_run(
        guidance=guidance, seed=seed, steps=steps, batch=batch, against_steps=baseline_steps
    )
    texts = common.gather_prompts(prompts, prompt_file, default="novel")
    settings = common.method_settings(
        method, mode=mode, threshold=threshold, max_skip=max_skip, calibration=calibration,
        blocks=blocks, tolerance=tolerance, iterations=iterations, exits=exits, model=model,
    )  # fmt: skip
    check_writable(out)
    pipe = load_pipeline(model, getattr(torch, dtype.value), device.value)
    if method is Method.auto:
        settings = common.decide(pipe, texts, steps, guidance, batch, tolerance)
    plain = Job(
        label="plain", solver=against or solver, grid=None if against else grid,
        steps=baseline_steps,
    )  # fmt: skip
    chosen = Job(label=method.value, method=settings, solver=solver, grid=grid, steps=steps)
    runs = common.run(
        "compare", pipe, [plain, chosen], texts, guidance=guidance, seed=seed, batch=batch
    )
    results = [_result(run, runs[0], min(batch, len(texts))) for run in runs]
    files = _draw(runs, texts, out, settings)
    if as_json:
        document = {
            "command": "compare", "environment": environment(pipe.device.type), "model": model,
            "prompts": len(texts), "guidance": guidance, "seed": seed, "results": results,
            "baseline": {"solver": runs[0].solver, "steps": baseline_steps},
            "pictures": [str(file) for file in files],
        }  # fmt: skip
        common.print_json(document)
        return
    _print_table(results)
    print("pictures: " + ", ".join(str(file) for file in files))


def _result(run: Run, plain: Run, batch: int) -> dict[str, Any]:
    """One entry of the JSON contract (design, section 8)."""
    from sidestep.metrics import mean_psnr, percentile, psnr, ssim

    same = run is plain
    decibels = psnr(run.images, plain.images)
    return {
        "method": "plain" if same else run.job.label,
        "solver": run.solver,
        "steps": run.job.steps,
        "batch": batch,
        "nfe": sum(run.nfe) / len(run.nfe),
        "ticks": sum(run.ticks) / len(run.ticks),
        "seconds": run.median_seconds,
        "speedup": plain.median_seconds / run.median_seconds,
        "psnr": None if same else mean_psnr(decibels),
        "psnr_p10": None if same else percentile(decibels, 0.1),
        "ssim": None if same else sum(values := ssim(run.images, plain.images)) / len(values),
        "layers": sum(run.layers) / len(run.layers) if run.layers else None,
        "iterations": sum(run.iterations) / len(run.iterations) if run.iterations else None,
    }


def _draw(runs: list[Run], texts: list[str], out: Path, settings: Any) -> list[Path]:
    from sidestep.report.pictures import calls_chart, picture_grid, save_figure

    plain, chosen = runs
    shown = min(len(texts), 16)
    captions = [_captions(run)[:shown] for run in runs]
    labels = [f"plain\n{plain.solver}", f"{chosen.job.label}\n{chosen.solver}"]
    rows = [(label, run.images[:shown]) for label, run in zip(labels, runs, strict=True)]
    save_figure(picture_grid(rows, texts[:shown], captions), out)
    files = [out]
    if chosen.called is not None and chosen.criterion is not None and not chosen.layers:
        chart = out.with_name(f"{out.stem}-calls{out.suffix}")
        save_figure(calls_chart(chosen.called, chosen.criterion, settings.threshold, texts), chart)
        files.append(chart)
    return files


def _captions(run: Run) -> list[str]:
    """For each picture what it took."""
    if run.iterations:
        return [f"{n} calls in a row" for n in run.image_ticks]
    if run.layers:
        return [f"{depth:.1f} blocks a step" for depth in run.layers]
    return [f"{n:.0f} calls" for n in run.nfe]


def _print_table(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("method", "solver", "steps", "calls", "seconds", "speed-up", "PSNR", "SSIM"):
        table.add_column(column, justify="left" if column in ("method", "solver") else "right")
    for r in results:
        quality = ["", ""] if r["psnr"] is None else [f"{r['psnr']:.1f} dB", f"{r['ssim']:.3f}"]
        table.add_row(
            r["method"], r["solver"], str(r["steps"]), f"{r['nfe']:.1f}", f"{r['seconds']:.2f}",
            f"{r['speedup']:.2f}x", *quality,
        )  # fmt: skip
    Console().print(table)
    for r in results:
        if r["layers"] is not None:
            print(f"{r['method']}: {r['layers']:.1f} blocks a step")
        if r["iterations"] is not None:
            print(
                f"{r['method']}: {r['iterations']:.1f} iterations, {r['ticks']:.1f} calls in a row"
            )
