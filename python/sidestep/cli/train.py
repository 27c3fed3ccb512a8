"""``sidestep train``: the models that ship, from packages alone."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sidestep.cli import common
from sidestep.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Training of what ships with sidestep.")


@app.callback()
def _group() -> None:
    """Training of what ships with sidestep."""


Data = Annotated[Path, typer.Option(help="Where the emoji-datasource packages are unpacked.")]
Folder = Annotated[Path, typer.Option(help="The pipeline folder to write.")]
Init = Annotated[
    Path | None, typer.Option(help="The pipeline folder to start from. Default: the bundled one.")
]
Minutes = Annotated[float | None, typer.Option(help="Length by the clock.")]
Iterations = Annotated[int | None, typer.Option(help="Length in steps.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: torch's own setting.")]


@app.command("emoji-codec")
def emoji_codec(
    data: Data,
    out: Folder,
    minutes: Minutes = None,
    iterations: Iterations = None,
    batch: common.Batch = 64,
    lr: Rate = 2e-3,
    seed: common.Seed = 0,
    threads: Threads = 0,
    as_json: common.Json = False,
) -> None:
    """Trains tokenizer and autoencoder of the bundled model; `emoji-sd --from-scratch` is next.

    Needs `npm pack emoji-datasource-google@16.0.0`, unpacked with tar below the --data folder.
    """
    from sidestep.training.emoji_codec import CodecTraining, train_codec

    settings = CodecTraining(
        out=out, data=data, minutes=minutes, iterations=iterations, batch=batch, lr=lr, seed=seed,
        threads=threads,
    )  # fmt: skip
    result = train_codec(settings, _tell)
    _report("emoji-codec", result, as_json, psnr=result.psnr)


@app.command("emoji-sd")
def emoji_sd(
    data: Data,
    out: Folder,
    init: Init = None,
    minutes: Minutes = None,
    iterations: Iterations = None,
    from_scratch: Annotated[bool, typer.Option(help="Start from random weights.")] = False,
    batch: common.Batch = 32,
    lr: Rate = 4e-4,
    seed: common.Seed = 0,
    threads: Threads = 0,
    as_json: common.Json = False,
) -> None:
    """Trains UNet and text encoder of the bundled model on emoji and pictures composed of them.

    Needs `npm pack emoji-datasource-google@16.0.0`, unpacked with tar in the --data folder.
    """
    from sidestep.training.emoji_sd import EmojiTraining, train

    settings = EmojiTraining(
        out=out, data=data, init=init, minutes=minutes, iterations=iterations,
        from_scratch=from_scratch, batch=batch, lr=lr, seed=seed, threads=threads,
    )  # fmt: skip
    result = train(settings, _tell)
    _report("emoji-sd", result, as_json, captions=len(result.captions))


@app.command("emoji-dit")
def emoji_dit(
    data: Data,
    out: Folder,
    init: Init = None,
    minutes: Minutes = None,
    iterations: Iterations = None,
    cool_down: Annotated[
        int | None, typer.Option(help="Steps in which the rate falls from the checkpoint's to 0.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from OUT.checkpoint if it is there.")] = False,
    batch: common.Batch = 32,
    lr: Rate = 8e-4,
    seed: common.Seed = 0,
    threads: Threads = 0,
    bf16: Annotated[bool, typer.Option(help="Multiply matrices in bfloat16.")] = False,
    as_json: common.Json = False,
) -> None:
    """Trains a small diffusion transformer on the pictures and latents of `emoji-sd`.

    Needs `npm pack emoji-datasource-google@16.0.0`, unpacked with tar in the --data folder.
    """
    from sidestep.training.emoji_dit import TransformerTraining, train_transformer

    settings = TransformerTraining(
        out=out, data=data, init=init, minutes=minutes, iterations=iterations, cool_down=cool_down,
        resume=resume, batch=batch, lr=lr, seed=seed, threads=threads, bf16=bf16,
    )  # fmt: skip
    result = train_transformer(settings, _tell)
    _report("emoji-dit", result, as_json, captions=len(result.captions))


@app.command("adaptive")
def adaptive(
    out: Annotated[Path, typer.Option(help="The file to write (safetensors).")],
    reuse: Annotated[str, typer.Option(help="The reuse rule whose error is learned.")] = "damped",
    trajectories: Annotated[int, typer.Option(help="Trajectories to record.")] = 224,
    batch: common.Batch = 16,
    iterations: Annotated[int, typer.Option(help="Steps of the fit.")] = 3000,
    lr: Rate = 1e-2,
    seed: common.Seed = 0,
    threads: Threads = 0,
    as_json: common.Json = False,
) -> None:
    """Trains the predictor of `Adaptive(mode="learned")` on trajectories of the bundled model.

    Nearly all of the time goes into recording.
    """
    from sidestep.report.progress import progress
    from sidestep.training.adaptive_predictor import PredictorTraining, train_predictor

    settings = PredictorTraining(
        out=out, reuse=reuse, trajectories=trajectories, batch=batch, iterations=iterations, lr=lr,
        seed=seed, threads=threads,
    )  # fmt: skip
    with progress(-(-trajectories // batch), "train adaptive") as advance:
        result = train_predictor(settings, advance, _tell)
    figures = {"samples": result.samples, "explained": result.explained}
    _report("adaptive", result, as_json, **figures)


class ExitsMode(str, Enum):
    """How exits are trained."""

    excess = "excess"
    faithful = "faithful"


@app.command("exits")
def exits(
    model: Annotated[str, typer.Argument(help="A bundled model or a local diffusers folder.")],
    out: Annotated[Path, typer.Option(help="excess: the file to write; faithful: the folder.")],
    mode: Annotated[
        ExitsMode,
        typer.Option(
            help="excess: exits of the model as it is, from its own trajectories; faithful: "
            "AdaDiff, which trains the model on."
        ),
    ] = ExitsMode.excess,
    iterations: Annotated[
        int | None, typer.Option(help="Length in steps. excess: 1500 if not given.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="excess: pictures a run, 16; faithful: a step, 32.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. excess: 1e-3; faithful: 2e-4.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="excess: a file, one a line. Default: the model's captions.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="excess: of a trajectory, 20.")] = None,
    guidance: Annotated[float | None, typer.Option(help="excess: guidance scale, 7.5.")] = None,
    trajectories: Annotated[int | None, typer.Option(help="excess: trained on, 64.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="faithful: where the emoji-datasource packages are.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="faithful: length by the clock.")] = None,
    resume: Annotated[
        bool, typer.Option(help="faithful: go on from OUT.checkpoint if it is there.")
    ] = False,
    released: Annotated[
        bool, typer.Option(help="faithful: with the deviations of AdaDiff's released code.")
    ] = False,
    seed: common.Seed = 0,
    threads: Threads = 0,
    as_json: common.Json = False,
) -> None:
    """Trains the exits of `EarlyExit` for a transformer that rows may leave early."""
    own: dict[ExitsMode, dict[str, Any]] = {
        ExitsMode.excess: {
            "prompts": prompts, "steps": steps, "guidance": guidance, "trajectories": trajectories,
        },
        ExitsMode.faithful: {
            "data": data, "minutes": minutes, "resume": resume or None,
            "released": released or None,
        },
    }  # fmt: skip
    for other, options in own.items():
        for name, value in options.items():
            if other is not mode and value is not None:
                raise UserError(f"--{name}: belongs to --mode {other.value}, got {mode.value}")
    given = {"iterations": iterations, "batch": batch, "lr": lr, **own[mode]}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"out": out, "seed": seed, "threads": threads}
    train = _excess if mode is ExitsMode.excess else _faithful
    train(model, given, as_json)


def _excess(model: str, given: dict[str, Any], as_json: bool) -> None:
    from sidestep.models import load_pipeline, load_prompts
    from sidestep.report.progress import progress
    from sidestep.training.exits_excess import (
        ExcessTraining,
        pipeline_runs,
        prompts_of,
        train_excess,
    )

    pipe, source = load_pipeline(model), given.pop("prompts", None)
    if source is None:
        count = given.get("trajectories", ExcessTraining.trajectories)
        given["prompts"] = prompts_of(pipe, model, count, given["seed"])
    else:
        given["prompts"] = load_prompts(source)
    settings = ExcessTraining(**given)
    with progress(pipeline_runs(settings), "train exits") as advance:
        result = train_excess(pipe, settings, lambda: advance("pipeline"), _tell)
    figures = result.figures
    for exit, (error, plain) in enumerate(zip(figures.errors, figures.untranslated, strict=True)):
        print(f"exit {exit}: RMS error {error:.4f}, untranslated {plain:.4f}", file=sys.stderr)
    _report("exits", result, as_json, rank=figures.rank, covered=figures.covered)


def _faithful(model: str, given: dict[str, Any], as_json: bool) -> None:
    from sidestep.models import BUNDLED
    from sidestep.training.exits_faithful import SWITCHES, FaithfulTraining, train_faithful

    if "data" not in given:
        raise UserError("--data: expected where the emoji-datasource packages are unpacked")
    switches = dict.fromkeys(SWITCHES, given.pop("released", False))
    settings = FaithfulTraining(**given, **switches, init=BUNDLED.get(model, Path(model)))
    result = train_faithful(settings, _tell)
    _report("exits", result, as_json, captions=len(result.captions))


def _tell(iteration: int, share: float, loss: float, rate: float) -> None:
    if iteration % 10 == 0 or share >= 1:
        line = f"{share:4.0%}  iteration {iteration}  loss {loss:.4f}  learning rate {rate:.1e}"
        print(line, file=sys.stderr)


def _report(command: str, result: Any, as_json: bool, **figures: float) -> None:
    from sidestep.report.environment import environment

    document = {
        "command": f"train {command}", "environment": environment(), "out": str(result.out),
        "iterations": len(result.losses), "seconds": result.seconds, "loss": result.losses[-1],
        **figures,
    }  # fmt: skip
    if as_json:
        common.print_json(document)
        return
    minutes = result.seconds / 60
    told = ", ".join(f"{name} {value:g}" for name, value in figures.items())
    print(f"saved in {result.out}: {len(result.losses)} iterations, {minutes:.0f} min, {told}")
