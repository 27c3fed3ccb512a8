"""The optimisation loop that every training here shares: AdamW, warm-up, cosine, average, clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from sidestep.errors import UserError

WARM_UP = 50  # iterations
Progress = Callable[[int, float, float, float], None]


class Run(Protocol):
    """The settings the loop reads: its length by the clock or in iterations, and its rate."""

    @property
    def minutes(self) -> float | None: ...
    @property
    def iterations(self) -> int | None: ...
    @property
    def lr(self) -> float: ...


def check_settings(settings: Run, positive: Sequence[str], at_least_zero: Sequence[str]) -> None:
    """Refuses lengths and numbers that no run can have.

    Raises:
        UserError: A number is out of range, or the length is given twice or not at all.
    """
    if (settings.minutes is None) == (settings.iterations is None):
        raise UserError("training: expected exactly one of minutes and iterations")
    for name in ("minutes", "iterations", *positive):
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


def optimise(
    settings: Run,
    start: float,
    average: Average,
    loss_of: Callable[[], Tensor],
    losses: list[float],
    progress: Progress | None,
) -> Iterator[float]:
    """Takes optimizer steps until the run is over; yields the share done after each.

    Args:
        settings: Length and peak learning rate.
        start: ``time.monotonic()`` when the run began.
        average: Of the parameters that are trained.
        loss_of: The loss of a fresh batch, ``[]``.
        losses: Receives one value an iteration.
        progress: Called after each iteration with (iterations, share done, loss, learning rate).
    """
    parameters = average.parameters
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.01, fused=True)
    done = 0.0
    while done < 1:
        rate = settings.lr * min(1.0, (len(losses) + 1) / WARM_UP)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
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
        yield done


class Average:
    """Exponential moving average of parameters; its first steps average over fewer."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.steps = parameters, decay, 0
        self.shadow = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the parameters' present values into the average."""
        self.steps += 1
        decay = min(self.decay, self.steps / (10 + self.steps))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Puts the average in place of the parameters, and the parameters back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, shadow in zip(self.parameters, self.shadow, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)
