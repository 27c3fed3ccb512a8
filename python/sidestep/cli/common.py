"""What the commands share: options, the prompts, the JSON object, progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sidestep.errors import UserError

if TYPE_CHECKING:
    from sidestep.runtime.methods.adaptive import Adaptive
    from sidestep.runtime.methods.early_exit import EarlyExit
    from sidestep.runtime.methods.srds import SRDS
    from sidestep.sampling import Job, Run


class Method(str, Enum):
    """The methods of the command line."""

    serial = "serial"
    adaptive = "adaptive"
    srds = "srds"
    early_exit = "early-exit"
    auto = "auto"


class Dtype(str, Enum):
    """The model's dtype."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Device(str, Enum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts.", show_default=False)]
PromptFile = Annotated[
    str | None,
    typer.Option("--prompts", help="A file, one prompt a line, or a bundled set: novel, trained."),
]
Model = Annotated[str, typer.Option(help="emoji-sd (bundled) or a local diffusers folder.")]
Solver = Annotated[
    str | None,
    typer.Option(
        help="One of our plans (dpmsolver++2m, ...) or a diffusers scheduler class "
        "(EulerDiscreteScheduler, ...). Default: the pipeline's own scheduler."
    ),
]
Grid = Annotated[str | None, typer.Option(help="Time grid of our plans: karras, lu, ...")]
Steps = Annotated[int, typer.Option(help="Steps of the sampler.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale.")]
Seed = Annotated[int, typer.Option(help="Image i starts from seed + i.")]
Batch = Annotated[int, typer.Option(help="Images a batch.")]
Mode = Annotated[
    str | None,
    typer.Option(
        help="Adaptive: the criterion, learned if not given; error-control, paper, ... Early exit: "
        "static, sample or adadiff, as the exits are."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Adaptive: reuse while the criterion is below. Early exit: what the picture may lose. "
        "Larger is faster; the mode's own if not given."
    ),
]
MaxSkip = Annotated[
    int | None,
    typer.Option(help="Adaptive: reuse at most so often in a row. The mode's own if not given."),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        help="Adaptive, early exit: a file of sidestep calibrate, with the threshold it chose."
    ),
]
Blocks = Annotated[
    int | None,
    typer.Option(
        help="SRDS: blocks that run at once. The best where a call of any size takes as long if "
        "not given."
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="SRDS: error of the latents at which an image stops; 0 is exact. 0.05 if not given."
    ),
]
Iterations = Annotated[
    int | None, typer.Option(help="SRDS: most iterations. As many as blocks if not given.")
]
Exits = Annotated[
    Path | None,
    typer.Option(
        help="Early exit: the file that `sidestep train exits` wrote. Default: the one in the "
        "model's folder."
    ),
]
Reuse = Annotated[
    float | None,
    typer.Option(
        help="Early exit: also skip whole steps, as Adaptive does with this threshold. In mode "
        "sample they are paid from the budget that is calibrated."
    ),
]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="auto: the GPU if torch sees one, else the CPU.")
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="The model's dtype.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Out = Annotated[Path, typer.Option(help="The picture to write (PNG).")]


def gather_prompts(arguments: list[str] | None, source: str | None, default: str) -> list[str]:
    """Prompts from the arguments, else from the file or set, else from the default set.

    Raises:
        UserError: Both were given, or a prompt is empty.
    """
    from sidestep.models import load_prompts

    if arguments and source is not None:
        raise UserError("expected prompts either as arguments or with --prompts, got both")
    if arguments:
        if any(not prompt.strip() for prompt in arguments):
            raise UserError("PROMPT: got an empty prompt, expected some text")
        return list(arguments)
    return load_prompts(default if source is None else source)


def check_positive(**options: float) -> None:
    """Refuses options that are not positive, by name.

    Raises:
        UserError: One of them is zero or negative.
    """
    for name, value in options.items():
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')}: got {value}, expected more than 0")


def check_not_negative(**options: float) -> None:
    """Refuses options below zero, by name.

    Raises:
        UserError: One of them is.
    """
    for name, value in options.items():
        if not value >= 0:
            raise UserError(f"--{name.replace('_', '-')}: got {value}, expected 0 or more")


def check_run(*, guidance: float, seed: int, **positive: float) -> None:
    """Refuses numbers that no run can use.

    Raises:
        UserError: One is not positive, not finite or too large.
    """
    check_positive(**positive)
    if not math.isfinite(guidance):
        raise UserError(f"--guidance: got {guidance}, expected a finite number")
    if not 0 <= seed < 2**63 - 2**32:
        raise UserError(f"--seed: got {seed}, expected 0 or more, and below 2^63 - 2^32")


def print_json(document: dict[str, Any]) -> None:
    """Writes one object on stdout; numbers that JSON lacks become null."""
    sys.stdout.write(json.dumps(_finite(document), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


MethodOption = Annotated[
    Method,
    typer.Option(
        help="adaptive makes fewer model calls, srds makes many at once, early-exit runs fewer "
        "blocks of a transformer, auto measures whether srds is quicker here, serial is the plain "
        "loop."
    ),
]
Against = Annotated[
    str | None, typer.Option(help="Solver of the plain run. Default: the same solver.")
]
AgainstSteps = Annotated[
    int | None, typer.Option(help="Steps of the plain run. Default: the same number.")
]
OutFolder = Annotated[Path, typer.Option(help="The folder to write PNG files into.")]


def method_settings(
    method: Method,
    *,
    mode: str | None = None,
    threshold: float | None = None,
    max_skip: int | None = None,
    calibration: Path | None = None,
    blocks: int | None = None,
    tolerance: float | None = None,
    iterations: int | None = None,
    exits: Path | None = None,
    reuse: float | None = None,
    model: str = "",
) -> Adaptive | SRDS | EarlyExit | None:
    """The settings of a method; None for the plain loop, and for `auto`, which is not decided yet.

    Raises:
        UserError: A setting is out of its range, or belongs to another method.
    """
    from sidestep.models import exits_of
    from sidestep.runtime.methods.adaptive import Adaptive
    from sidestep.runtime.methods.early_exit import FORETELLING, EarlyExit
    from sidestep.runtime.methods.srds import SRDS

    owners = {
        "--mode": (mode, [Method.adaptive, Method.early_exit]),
        "--threshold": (threshold, [Method.adaptive, Method.early_exit]),
        "--max-skip": (max_skip, [Method.adaptive]),
        "--calibration": (calibration, [Method.adaptive, Method.early_exit]),
        "--blocks": (blocks, [Method.srds]),
        "--tolerance": (tolerance, [Method.srds, Method.auto]),
        "--iterations": (iterations, [Method.srds]),
        "--exits": (exits, [Method.early_exit]),
        "--reuse": (reuse, [Method.early_exit]),
    }
    for option, (value, methods) in owners.items():
        if value is not None and method not in methods:
            names = " or ".join(one.value for one in methods)
            raise UserError(f"{option}: got it with --method {method.value}, expected {names}")
    allowed = SRDS().tolerance if tolerance is None else tolerance
    try:
        if method is Method.adaptive:
            return Adaptive(
                mode=mode, threshold=threshold, max_skip=max_skip,
                calibration=None if calibration is None else str(calibration),
            )  # fmt: skip
        if method is Method.early_exit:
            exits = exits or exits_of(model)
            if exits is None:
                raise UserError(
                    "--exits: expected the file that `sidestep train exits` wrote, as there is no "
                    f"exits.safetensors in the folder of {model}"
                )
            skips = FORETELLING if mode == "sample" else None
            return EarlyExit(
                exits=exits, mode=mode, threshold=threshold, calibration=calibration,
                reuse=None if reuse is None else Adaptive(mode=skips, threshold=reuse),
            )  # fmt: skip
        settings = SRDS(blocks=blocks, tolerance=allowed, max_iterations=iterations)
    except ValueError as error:
        raise UserError(str(error)) from error
    return settings if method is Method.srds else None


def decide(pipe: Any, texts: list[str], steps: int, guidance: float, batch: int,
           tolerance: float | None) -> SRDS | None:  # fmt: skip
    """`sidestep.auto` for these prompts; what it finds is said on stderr.

    Raises:
        UserError: The pipeline cannot be measured.
    """
    from sidestep import planning
    from sidestep.runtime.methods.srds import SRDS

    chunk = texts[:batch]
    try:
        settings, reason = planning.decide(
            pipe, steps, len(chunk), SRDS().tolerance if tolerance is None else tolerance,
            prompt=chunk, guidance_scale=guidance,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"--method auto: {error}") from error
    name = "serial" if settings is None else f"srds in {settings.blocks} blocks"
    sys.stderr.write(f"auto: {name}: {reason}\n")
    return settings


def run(command: str, pipe: Any, jobs: list[Job], texts: list[str], **settings: Any) -> list[Run]:
    """`sidestep.sampling.run_jobs` under a progress bar."""
    from sidestep.report.progress import progress
    from sidestep.sampling import run_jobs

    batches = -(-len(texts) // settings["batch"])
    with progress(batches * sum(job.steps for job in jobs), command) as advance:
        return run_jobs(pipe, jobs, texts, on_step=advance, **settings)


def slug(text: str) -> str:
    """A prompt as a short file name."""
    kept = "".join(c if c.isalnum() else "-" for c in text.lower())
    return "-".join(part for part in kept.split("-") if part)[:40] or "picture"
