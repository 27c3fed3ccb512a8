"""Conformal risk control: the largest threshold whose expected loss stays below alpha.

Angelopoulos, Bates, Fisch, Lei and Schuster, "Conformal Risk Control", ICLR 2024 (arXiv
2208.02814), section 2, for losses L_i(theta) in [0, B], B = 1, that do not fall with theta:

    R_n(theta)  =  (1/n) sum_i L_i(theta)

    theta_hat   =  max { theta : n/(n+1) R_n(theta) + B/(n+1) <= alpha }

    E[ L_{n+1}(theta_hat) ]  <=  alpha         for exchangeable L_1, ..., L_{n+1}   (theorem 1)

Nothing is assumed of the model, the pictures or the method. The expectation is over the n draws as
well: of many calibrations the promise holds on average, of one it may be missed by about
sqrt(alpha (1 - alpha) / n). Losses that do fall somewhere are made monotone one by one, by their
running maximum (section 4.3 there), which can only raise them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDING = 1e-9  # 1 - 0.9 is a little less than 0.1


def monotone(
    losses: ArrayLike,  # [T, n] in [0, 1], thresholds ascending
) -> NDArray[np.float64]:  # [T, n]
    """max over theta' <= theta of L_i(theta')."""
    return np.maximum.accumulate(np.asarray(losses, dtype=np.float64), axis=0)


def bound(
    losses: ArrayLike,  # [T, n] in [0, 1], thresholds ascending
) -> NDArray[np.float64]:  # [T]
    """n/(n+1) R_n(theta) + 1/(n+1): what is compared with alpha. It ascends."""
    made = monotone(losses)
    n = made.shape[1]
    return (made.sum(1) + 1) / (n + 1)


def choose(
    losses: ArrayLike,  # [T, n] in [0, 1], thresholds ascending
    alpha: float,
) -> int | None:
    """The index of theta_hat; None where no threshold will do."""
    allowed = np.flatnonzero(bound(losses) <= alpha + _ROUNDING)
    return int(allowed[-1]) if len(allowed) else None


def fewest(alpha: float) -> int:
    """The least n with which a method that never fails is accepted: 1/(n+1) <= alpha."""
    return math.ceil(1 / alpha - 1 - _ROUNDING)


def chance(kept: int, images: int, confidence: float) -> float:
    """P(Binomial(images, confidence) <= kept): of seeing as few, where the promise holds."""
    lost = 1 - confidence
    return sum(math.comb(images, k) * confidence**k * lost ** (images - k) for k in range(kept + 1))
