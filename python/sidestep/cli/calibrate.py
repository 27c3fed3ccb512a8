"""``sidestep calibrate``: the threshold that keeps a promise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from sidestep.cli import common
from sidestep.cli.common import Device, Dtype, Method

if TYPE_CHECKING:
    from sidestep.runtime.calibration import Calibration

Target = Annotated[
    str, typer.Option(help="What a picture has to keep to the full run: psnr>=DB or ssim>=NUMBER.")
]
Confidence = Annotated[float, typer.Option(help="The share of pictures that are to keep it.")]
Images = Annotated[int, typer.Option(help="To calibrate on, and as many again to check.")]
Thresholds = Annotated[
    list[float] | None,
    typer.Option(
        "--threshold",
        help="To choose among (repeat). Default: the method's own times 1/32 to 2.8.",
    ),
]


def calibrate(
    target: Target,
    confidence: Confidence = 0.9,
    prompt_file: common.PromptFile = None,
    model: common.Model = "emoji-sd",
    method: common.MethodOption = Method.adaptive,
    solver: common.Solver = None,
    grid: common.Grid = None,
    steps: common.Steps = 50,
    guidance: common.Guidance = 7.5,
    seed: common.Seed = 0,
    images: Images = 64,
    batch: common.Batch = 16,
    mode: common.Mode = None,
    threshold: Thresholds = None,
    max_skip: common.MaxSkip = None,
    exits: common.Exits = None,
    reuse: common.Reuse = None,
    dtype: common.DtypeOption = Dtype.float32,
    device: common.DeviceOption = Device.auto,
    out: Annotated[Path, typer.Option(help="The file to write (JSON).")] = Path(
        "sidestep-calibration.json"
    ),
    as_json: common.Json = False,
) -> None:
    """Chooses the largest threshold with which the target is kept, and tries it on fresh seeds.

    Without --prompts the 64 novel prompts of the bundled model are used, to choose and, from other
    seeds, to check. The file is for `Adaptive(calibration=...)`, `EarlyExit(calibration=...)` and
    `generate --calibration`. Where no threshold will do, nothing is written.
    """
    from sidestep.calibration import Question, calibrate
    from sidestep.calibration import Target as Wanted
    from sidestep.errors import UserError
    from sidestep.models import load_pipeline
    from sidestep.report.environment import environment
    from sidestep.report.pictures import check_writable
    from sidestep.report.progress import progress

    common.check_run(guidance=guidance, seed=seed, steps=steps, batch=batch, images=images)
    if method not in (Method.adaptive, Method.early_exit):
        raise UserError(
            f"--method: got {method.value}, expected adaptive or early-exit, which have a threshold"
        )
    settings = common.method_settings(
        method, mode=mode, max_skip=max_skip, exits=exits, reuse=reuse, model=model
    )
    question = Question(
        target=Wanted.parse(target), confidence=confidence, method=settings,
        thresholds=threshold or (), model=model, solver=solver, grid=grid, steps=steps,
        guidance=guidance, images=images, seed=seed, batch=batch,
    )  # fmt: skip
    texts = common.gather_prompts(None, prompt_file, default="novel")
    check_writable(out, (".json",))
    pipe = load_pipeline(model, getattr(torch, dtype.value), device.value)
    runs = len(question.candidates) + 3
    with progress(runs * -(-images // batch) * steps, "calibrate") as advance:
        made = calibrate(pipe, texts, question, advance)
    made.save(out)
    if as_json:
        common.print_json(
            {
                "command": "calibrate",
                "environment": environment(pipe.device.type),
                "out": str(out),
                "results": made.curve,
                "calibration": made.document(),
            }
        )
        return
    _print_report(made, question.candidates[-1])
    print(f"written: {out}")


def _print_report(made: Calibration, largest: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    early = "layers" in made.fresh
    blocks = ("blocks a step",) if early else ()
    for column in ("threshold", "calls", *blocks, "kept", "bound on the rest"):
        table.add_column(column, justify="right")
    for point in made.curve:
        table.add_row(
            f"{point['threshold']:g}", f"{point['nfe']:.1f}",
            *([f"{point['layers']:.1f}"] if early else []),
            f"{point['kept']:g} of {point['images']:g}", f"{point['bound']:.1%}",
        )  # fmt: skip
    Console().print(table)
    fresh = made.fresh
    more = "; no larger one was tried" if made.threshold == largest else ""
    print(f"threshold {made.threshold:g} for {made.promise}{more}")
    print(
        f"on fresh seeds: kept by {fresh['kept']:g} of {fresh['images']:g} "
        f"({fresh['rate']:.1%}), {fresh['nfe']:.1f} of {fresh['nfe_full']:.1f} calls"
        + (f", {fresh['layers']:.1f} blocks a step" if early else "")
    )
    if fresh["chance"] < 0.05:
        print(
            f"that is less than promised, and would be chance in {fresh['chance']:.1%} of cases: "
            "calibrate on more --images, or ask for less"
        )
