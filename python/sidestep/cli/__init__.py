"""The ``sidestep`` command: one file per command, in the order a newcomer meets them."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from sidestep.cli import bench, calibrate, compare, doctor, generate, plan, profile, train
from sidestep.errors import UserError
from sidestep.kernels import BackendUnavailable, config

app = typer.Typer(
    name="sidestep",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Diffusion sampling with fewer, cheaper or parallel model calls, and the same picture.",
)
app.command("generate")(generate.generate)
app.command("compare")(compare.compare)
app.command("plan")(plan.plan)
app.add_typer(bench.app, name="bench")
app.add_typer(train.app, name="train")
app.command("calibrate")(calibrate.calibrate)
app.command("profile")(profile.profile)
app.command("doctor")(doctor.doctor)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; what the user got wrong ends in one sentence and exit code 2."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # what they print at loading is not our user's
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        config.backend()
    except ValueError as error:
        _stop(str(error))
    try:
        code = app(args=arguments, standalone_mode=False)
    except (UserError, BackendUnavailable) as error:
        _stop(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _stop("interrupted", 130)
    except typer.Exit as request:
        code = request.exit_code
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own: an unknown option, a wrong type
            raise
        _stop(error.format_message())
    sys.exit(code or 0)


def _stop(message: str, code: int = 2) -> NoReturn:
    sys.stderr.write("sidestep: " + " ".join(message.split()) + "\n")
    sys.exit(code)
