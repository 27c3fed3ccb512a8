"""Checkpoints of a training run, which may be killed at any moment and goes on where it was."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sidestep.errors import UserError
from sidestep.runtime.files import write_whole
from sidestep.training.average import Average


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `Checkpoint.save` wrote.

    Args:
        path: The file.
        settings: What it must have in common with the run that goes on from it.

    Raises:
        UserError: The file cannot be read, or is of a run with other settings, or something else.
    """
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot read it as a checkpoint: {error}") from error
    if not isinstance(state, dict) or not {"settings", "losses", "optimizer"} <= state.keys():
        raise UserError(f"{path}: not a checkpoint of a training run")
    for name, expected in settings.items():
        if (came := state["settings"].get(name)) != expected:
            raise UserError(
                f"{path}: of a run with {name} {came}, expected {expected}; use the same settings, "
                "or another out"
            )
    return state


def resume_from(path: Path, settings: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """What a run goes on from; None where there is no file.

    Raises:
        UserError: There is one, and the run was not asked to go on; or it does not fit.
    """
    if not path.exists():
        return None
    if not resume:
        raise UserError(f"{path}: there from an earlier run; resume it, or remove the file")
    return read_checkpoint(path, settings)


@dataclass(kw_only=True)
class Checkpoint:
    """Where a run is kept, and what is kept besides the parameters, the average and the optimizer.

    Attributes:
        path: The file, written whole or not at all.
        settings: What a run that goes on from the file must have in common with this one.
        generator: Of the batches.
        minutes: How often the file is written.
        resumed: What `read_checkpoint` gave, for a run that goes on; None for a new one.
    """

    path: Path
    settings: Mapping[str, Any]
    generator: torch.Generator
    minutes: float
    resumed: dict[str, Any] | None = None
    _written: float = field(default_factory=time.monotonic, init=False)

    def restore(
        self, average: Average, optimizer: torch.optim.Optimizer, losses: list[float]
    ) -> None:
        """Puts everything back to where `resumed` left it; nothing happens without one."""
        if self.resumed is None:
            return
        average.load_state(self.resumed["average"])
        optimizer.load_state_dict(self.resumed["optimizer"])
        self.generator.set_state(self.resumed["generator"])
        losses[:] = self.resumed["losses"]
        self.resumed = None

    def save(
        self, average: Average, optimizer: torch.optim.Optimizer, losses: list[float], over: bool
    ) -> None:
        """Writes the file if that is due, or in any case when the run is `over`."""
        if not over and time.monotonic() - self._written < 60 * self.minutes:
            return
        buffer = io.BytesIO()
        state = {
            "settings": dict(self.settings),
            "losses": losses,
            "average": average.state(),
            "optimizer": optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        torch.save(state, buffer)
        write_whole(self.path, buffer.getvalue())
        self._written = time.monotonic()
