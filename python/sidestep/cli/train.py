"""``sidestep train``: the models that ship, from packages alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sidestep.cli import common

app = typer.Typer(no_args_is_help=True, help="Training of what ships with sidestep.")


@app.callback()
def _group() -> None:
    """Training of what ships with sidestep."""


@app.command("emoji-sd")
def emoji_sd(
    data: Annotated[Path, typer.Option(help="Where emoji-datasource-google is unpacked.")],
    out: Annotated[Path, typer.Option(help="The pipeline folder to write.")],
    minutes: Annotated[float | None, typer.Option(help="Length by the clock.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Length in steps.")] = None,
    from_scratch: Annotated[bool, typer.Option(help="Start from random weights.")] = False,
    batch: common.Batch = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-4,
    seed: common.Seed = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: torch's own setting.")] = 0,
    as_json: common.Json = False,
) -> None:
    """Trains UNet and text encoder of the bundled model on emoji and pictures composed of them.

    Needs `npm pack emoji-datasource-google@16.0.0`, unpacked with tar in the --data folder.
    """
    from sidestep.report.environment import environment
    from sidestep.training.emoji_sd import EmojiTraining, train

    settings = EmojiTraining(
        out=out, data=data, minutes=minutes, iterations=iterations, from_scratch=from_scratch,
        batch=batch, lr=lr, seed=seed, threads=threads,
    )  # fmt: skip

    def tell(iteration: int, share: float, loss: float, rate: float) -> None:
        if iteration % 10 == 0 or share >= 1:
            line = f"{share:4.0%}  iteration {iteration}  loss {loss:.4f}  learning rate {rate:.1e}"
            print(line, file=sys.stderr)

    result = train(settings, tell)
    if as_json:
        common.print_json(
            {
                "command": "train emoji-sd", "environment": environment(), "out": str(result.out),
                "iterations": len(result.losses), "seconds": result.seconds,
                "captions": len(result.captions), "loss": result.losses[-1],
            }
        )  # fmt: skip
        return
    print(f"saved in {result.out}: {len(result.losses)} iterations, {result.seconds / 60:.0f} min")
