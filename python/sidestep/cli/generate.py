"""``sidestep generate``: pictures from prompts."""

from __future__ import annotations

from pathlib import Path

import torch

from sidestep.cli import common
from sidestep.cli.common import Device, Dtype, Method


def generate(
    prompts: common.Prompts = None,
    prompt_file: common.PromptFile = None,
    model: common.Model = "emoji-sd",
    method: common.MethodOption = Method.adaptive,
    solver: common.Solver = None,
    grid: common.Grid = None,
    steps: common.Steps = 50,
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
    out: common.OutFolder = Path("sidestep-pictures"),
    as_json: common.Json = False,
) -> None:
    """Makes a picture per prompt, a PNG file each."""
    from sidestep.models import load_pipeline
    from sidestep.report.environment import environment
    from sidestep.report.pictures import check_folder, save_image
    from sidestep.sampling import Job

    common.check_run(guidance=guidance, seed=seed, steps=steps, batch=batch)
    texts = common.gather_prompts(prompts, prompt_file, default="novel")
    settings = common.method_settings(
        method, mode=mode, threshold=threshold, max_skip=max_skip, calibration=calibration,
        blocks=blocks, tolerance=tolerance, iterations=iterations, exits=exits, model=model,
    )  # fmt: skip
    check_folder(out)
    pipe = load_pipeline(model, getattr(torch, dtype.value), device.value)
    if method is Method.auto:
        settings = common.decide(pipe, texts, steps, guidance, batch, tolerance)
    job = Job(label=method.value, method=settings, solver=solver, grid=grid, steps=steps)
    (run,) = common.run("generate", pipe, [job], texts, guidance=guidance, seed=seed, batch=batch)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{i:03d}-{common.slug(text)}.png" for i, text in enumerate(texts)]
    for image, file in zip(run.images, files, strict=True):
        save_image(image, file)
    if as_json:
        results = [
            {
                "prompt": text, "file": str(files[i]), "seed": seed + i, "method": method.value,
                "solver": run.solver, "steps": steps, "nfe": run.nfe[i],
                "batch": min(batch, len(texts)), "ticks": run.ticks[i // batch],
                "seconds": run.seconds[i // batch],
            }
            for i, text in enumerate(texts)
        ]  # fmt: skip
        common.print_json(
            {
                "command": "generate",
                "environment": environment(pipe.device.type),
                "results": results,
            }
        )  # fmt: skip
        return
    calls = sum(run.nfe) / len(run.nfe)
    print(f"{len(files)} pictures in {out}, {calls:.1f} model calls each, {sum(run.seconds):.1f} s")
