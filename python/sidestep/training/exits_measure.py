"""What plans are made from, measured on trajectories that nothing was trained on.

e_ik^2   mean square of the guided output's error at exit i of step k
S_k      = RMS(x_0' - x_0) / (e_k g_k), x_0' being the finished latents where one exit was taken
           at step k and the whole model at every other one (g_k: `carried`)

and, along the first of them, how fast a call goes stale (`exits_stale`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestep.runtime.exits.file import Measured
from sidestep.runtime.exits.modules import clamp_log_snr
from sidestep.runtime.methods.criteria.carried_error import carried
from sidestep.training.exits_fit import LEAST, Fit
from sidestep.training.exits_stale import staleness
from sidestep.training.exits_trajectories import Trajectories

RUNS = 2
"""Runs that errors are measured on: one of the model's own, one with exits at random."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How good exits are, on trajectories that nothing was trained on.

    Attributes:
        errors: ``[K]`` RMS of e_i over all steps.
        untranslated: ``[K]`` the same without translators.
        rank: Spearman's correlation of q50 and ln e_i among the rows of one step, in the mean over
            steps and exits: what the network knows that the step does not.
        covered: Share of rows whose error is below q90.
    """

    errors: list[float]
    untranslated: list[float]
    rank: float
    covered: float


@torch.no_grad()
def measure(trajectories: Trajectories, fit: Fit, pictures: int) -> tuple[Measured, Figures]:
    """Runs the pipeline a few times more.

    Args:
        trajectories: Goes on with prompts and seeds that were not used yet.
        fit: What was learned.
        pictures: That S is measured on.
    """
    batch, exits = trajectories.settings.batch, trajectories.exits
    whole = trajectories.run_whole(batch)
    calls = [*whole, *trajectories.run(batch, trajectories.at_random)]
    squares = np.zeros((2, exits, trajectories.settings.steps))  # translated, and not
    ranks, below = [], []
    for call in calls:
        for exit in range(exits):
            square, quantiles = fit.foretell(call, exit)
            plain = fit.error(call, call.hidden[exit])
            squares[:, exit, call.step] += [float(square.mean()), float(plain.mean())]
            logs = (square + LEAST).log() / 2
            ranks.append(spearman(quantiles[:, 0], logs))
            below.append(float((logs <= quantiles[:, 1]).float().mean()))
    squares /= RUNS
    stale, growth = staleness(whole, trajectories.course.log_snr or (), fit.head)
    measured = Measured(
        log_snr=clamp_log_snr(torch.tensor(fit.course.log_snr)),
        errors=torch.from_numpy(np.sqrt(squares[0] + LEAST)).float(),
        sensitivity=_sensitivity(trajectories, fit, pictures),
        stale=stale,
        growth=growth,
    )
    errors, untranslated = np.sqrt(squares.mean(2)).tolist()
    return measured, Figures(
        errors=errors,
        untranslated=untranslated,
        rank=float(np.mean(ranks)),
        covered=float(np.mean(below)),
    )


def sensitivity_runs(steps: int, batch: int) -> int:
    """Runs of the pipeline for each picture of `_sensitivity`."""
    return len(_chunks(steps, batch))


def _chunks(steps: int, batch: int) -> list[range]:
    """The steps in parts, each as many as fit into a batch beside an undisturbed picture."""
    size = max(1, batch - 1)
    return [range(begin, min(begin + size, steps)) for begin in range(0, steps, size)]


def _sensitivity(trajectories: Trajectories, fit: Fit, pictures: int) -> Tensor:  # [T] fp32
    """S_k: every row of a batch but the first takes the middle exit, at a step of its own."""
    steps, exit = trajectories.settings.steps, trajectories.exits // 2
    damage, error = np.zeros(steps), np.zeros(steps)
    for _ in range(pictures):
        number = trajectories.taken
        for chunk in _chunks(steps, trajectories.settings.batch):
            trajectories.taken = number  # the same picture again

            def at_one(step: int, chunk: range = chunk) -> list[int | None]:
                return [None, *(exit if step == k else None for k in chunk)]

            calls = trajectories.run(1 + len(chunk), at_one, same=True)
            latents = trajectories.recorder.latents.float()
            moved = (latents - latents[:1]).square().flatten(1).mean(1)
            for row, k in enumerate(chunk, start=1):
                square, _ = fit.foretell(calls[k], exit)
                damage[k] += float(moved[row])
                error[k] += float(square[row])
    gains = np.maximum(carried(fit.course), LEAST)
    found = np.sqrt(damage / np.maximum(error, LEAST)) / gains
    return torch.from_numpy(found.clip(1e-6, 1e6)).float()


def spearman(a: Tensor, b: Tensor) -> float:
    """The correlation of the ranks of two lists of numbers; NaN of fewer than two."""
    ranks: Any = [x.argsort().argsort().double().cpu().numpy() for x in (a, b)]
    return float(np.corrcoef(ranks)[0, 1]) if len(a) > 1 else float("nan")
