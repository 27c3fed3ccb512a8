"""How wrong it is to go on with what earlier calls gave, measured (`sidestep.runtime.exits.menu`).

At step k of a trajectory of the whole model, its outputs at steps k - m and k - n are continued to
step k, and so is what lies behind each exit; e is the RMS error of the guided output. Over pairs
(m, n) the line

    ln e = ln stale + growth ln d,        d = lambda_k - lambda_(k - m)

is fitted by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from sidestep.runtime.exits.modules import clamp_log_snr
from sidestep.runtime.exits.rests import slope
from sidestep.training.exits_record import Call

PAIRS = ((1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (3, 6))
FIRST = 3
"""The first step with pairs of different m; the line of earlier ones is its."""
GROWTH = (0.5, 3.0)
"""What it is kept within."""
LEAST = 1e-6


def staleness(
    calls: Sequence[Call],
    log_snr: Sequence[float],  # [T]
    head: Callable[[Call, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # [K + 1, T], [K + 1, T]
    """Stale and growth: of the outputs, and of what lies behind each exit.

    Args:
        calls: T of them, of one trajectory, with the hidden states at K exits and at the end.
        log_snr: lambda of the steps, increasing.
        head: ``head(call, h)``, what the model's head makes of hidden states.
    """
    snr = clamp_log_snr(torch.tensor(log_snr)).double().numpy()
    lines = np.array(
        [_lines(calls, snr, head, step) for step in range(FIRST, len(calls))]
    )  # [T - FIRST, K + 1, 2]
    lines = np.concatenate([lines[:1]] * FIRST + [lines])
    stale, growth = torch.from_numpy(lines).float().permute(2, 1, 0)
    return stale.contiguous(), growth.contiguous()


def _lines(
    calls: Sequence[Call], snr: np.ndarray, head: Callable[[Call, Tensor], Tensor], step: int
) -> list[tuple[float, float]]:  # [K + 1]
    """Stale and growth at one step."""
    pairs = [(step - m, step - n) for m, n in PAIRS if n <= step]
    distances = np.array([snr[step] - snr[b] for b, _ in pairs])
    errors = np.array([_errors(calls, snr, head, step, b, a) for b, a in pairs])  # [pairs, K + 1]
    return [_line(distances, errors[:, i]) for i in range(errors.shape[1])]


def _errors(
    calls: Sequence[Call], snr: np.ndarray, head: Callable[[Call, Tensor], Tensor],
    step: int, b: int, a: int,
) -> list[float]:  # [K + 1]  # fmt: skip
    """e of what the calls at steps a and b are continued to."""
    now, newer, older = calls[step], calls[b], calls[a]
    w = slope(snr.tolist(), step, b, a)

    def continued(x_b: Tensor, x_a: Tensor) -> Tensor:
        return x_b.float() + w * (x_b.float() - x_a.float())

    outputs = [continued(newer.output, older.output)]
    for h, h_b, h_a in zip(now.hidden[:-1], newer.hidden[:-1], older.hidden[:-1], strict=True):
        rest = continued(newer.hidden[-1] - h_b, older.hidden[-1] - h_a)
        outputs.append(head(now, h.float() + rest))
    squares = [float(now.guided_error(output).mean()) for output in outputs]
    return [max(LEAST, square**0.5) for square in squares]


def _line(distances: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """Stale and growth of the points of one line."""
    x, y = np.log(distances), np.log(errors)
    growth = float(np.clip(np.polyfit(x, y, 1)[0], *GROWTH))
    return float(np.exp((y - growth * x).mean())), growth
