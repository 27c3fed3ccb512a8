"""The loop that every training here shares: AdamW, learning rate, average, clock, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from sidestep.errors import UserError
from sidestep.training.average import Average
from sidestep.training.checkpoint import Checkpoint

WARM_UP = 50  # iterations
LENGTHS = ("minutes", "iterations")
Progress = Callable[[int, float, float, float], None]
Schedule = Callable[[int, float], float]
"""The share of the peak learning rate after so many iterations and such a share of the run."""


class Run(Protocol):
    """The settings the loop reads: its length by the clock or in iterations, and its rate."""

    @property
    def minutes(self) -> float | None: ...
    @property
    def iterations(self) -> int | None: ...
    @property
    def lr(self) -> float: ...


def check_settings(
    settings: Run,
    positive: Sequence[str],
    at_least_zero: Sequence[str],
    lengths: Sequence[str] = LENGTHS,
) -> None:
    """Refuses lengths and numbers that no run can have.

    Raises:
        UserError: A number is out of range, or the length is given twice or not at all.
    """
    if sum(getattr(settings, name) is not None for name in lengths) != 1:
        raise UserError(f"training: expected exactly one of {' and '.join(lengths)}")
    for name in (*lengths, *positive):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"training: {name} is {value}, expected a number above 0")
    for name in at_least_zero:
        if getattr(settings, name) < 0:
            raise UserError(f"training: {name} is {getattr(settings, name)}, expected 0 or more")


def seed_all(seed: int, threads: int) -> None:
    """What every run begins with: torch's seed, and its threads unless 0 leaves them alone."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def cosine(iterations: int, done: float) -> float:
    """From 1 to 0 over the whole run."""
    return 0.5 * (1 + math.cos(math.pi * done))


def constant(iterations: int, done: float) -> float:
    """1 to the end, for runs whose length nobody knows."""
    return 1.0


def cooling(begin: int, stop: int) -> Schedule:
    """From 1 after `begin` iterations straight to 0 after `stop`."""
    return lambda iterations, done: (stop - iterations) / (stop - begin)


def optimise(
    settings: Run,
    start: float,
    average: Average,
    loss_of: Callable[[], Tensor],
    losses: list[float],
    progress: Progress | None,
    *,
    schedule: Schedule = cosine,
    checkpoint: Checkpoint | None = None,
) -> Iterator[float]:
    """Takes optimizer steps until the run is over; yields the share done after each.

    Args:
        settings: Length and peak learning rate.
        start: ``time.monotonic()`` when the run began.
        average: Of the parameters that are trained.
        loss_of: The loss of a fresh batch, ``[]``.
        losses: Receives one value an iteration, after those of the run that goes on.
        progress: Called after each iteration with (iterations, share done, loss, learning rate).
        schedule: Of the learning rate, after the warm-up.
        checkpoint: What the run goes on from, and where it is kept now and then and at its end.
    """
    parameters = average.parameters
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.01, fused=True)
    if checkpoint is not None:
        checkpoint.restore(average, optimizer, losses)
    done = len(losses) / settings.iterations if settings.iterations is not None else 0.0
    while done < 1:
        rate = settings.lr * min(1.0, (len(losses) + 1) / WARM_UP)
        rate *= schedule(len(losses), done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        losses.append(loss.item())
        if settings.iterations is not None:
            done = len(losses) / settings.iterations
        elif settings.minutes is not None:
            done = min(1.0, (time.monotonic() - start) / (60 * settings.minutes))
        if progress is not None:
            progress(len(losses), done, losses[-1], rate)
        if checkpoint is not None:
            checkpoint.save(average, optimizer, losses, over=done >= 1)
        yield done


def run_saving(steps: Iterator[float], minutes: float, save: Callable[[], None]) -> None:
    """Runs `optimise` to its end, and calls `save` every so many minutes and at the end."""
    saved = time.monotonic()
    for done in steps:
        if done < 1 and time.monotonic() - saved > 60 * minutes:
            save()
            saved = time.monotonic()
    save()
