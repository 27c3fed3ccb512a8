"""How much of an error of the model's output at one step is left in the finished picture.

An error of size 1 of the output at step k moves the finished latents by about S_k g_k.  The
solver's own error falls with its number of steps K, and what may be added to it falls with it:

    C_k = (K / 50)^(3/4) S_k g_k

    g_k     how far step k carries an error of the output into the latents
    S_k     how much of an error of the latents is left in the picture

With lambda = ln(alpha / sigma), h = lambda_{k+1} - lambda_k, the exact solution of the diffusion
ODE over a step with a constant error of the data prediction x0 (DPM-Solver++, eq. 9), in units in
which alpha^2 + sigma^2 = 1, and the exact flow for Gaussian data of standard deviation s, give

    g_k = alpha_{k+1} (1 - e^-h) |d x0 / d u|,        S_k = s / (alpha sqrt(s^2 + e^-2lambda))

Single skips of 25 DDIM steps of the bundled model (a trial by hand, no command repeats it) moved
the picture by 0.6 to 1.2 times this from lambda = -1.6 on, by most in the last steps: hence S_k is
taken 1.6 times larger there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sidestep.runtime.methods.criterion import Course
from sidestep.runtime.predictions import find_prediction

SPREAD = 0.25
"""s: of the finer structure of the data, which is decided late; its coarse structure has 1."""

LATE, LATE_WEIGHT = 0.4, 1.6
"""From this lambda on S_k is so much larger."""


def carried_error(course: Course) -> Sequence[float]:
    """C_k of every step.

    An unknown prediction type counts as epsilon. The last step ends at the clean picture. Where
    lambda is not known every step counts alike, ``S_k g_k = 1 / K``: 0.7 of their mean for epsilon.
    """
    if course.log_snr is None:
        steps = course.steps or 50
        return [share_of(steps) / steps] * steps
    share = share_of(len(course.log_snr))
    left = [_left(snr) for snr in course.log_snr]
    return [share * s * g for s, g in zip(left, carried(course), strict=True)]


def share_of(steps: int) -> float:
    """(K / 50)^(3/4): without it C_k is the error of the picture itself."""
    return float((steps / 50) ** 0.75)


def carried(course: Course) -> Sequence[float]:
    """g_k of every step of a course that knows its lambda."""
    assert course.log_snr is not None
    snr = np.append(np.asarray(course.log_snr, dtype=np.float64), math.inf)
    prediction = find_prediction(course.prediction or "epsilon")
    gains = []
    for now, after in pairwise(snr):
        noise, alpha = _noise(now), _alpha(now)
        scale = 1.0 if prediction.name == "edm" else alpha  # EDM's networks read x / alpha
        slope = prediction.data(scale, scale * noise)[1]
        ahead = after - now if now < math.inf else 0.0
        step = -math.expm1(-ahead) / math.hypot(1, math.exp(-after))
        gains.append(step * abs(slope))
    return gains


def _left(log_snr: float) -> float:
    """S_k."""
    noise, alpha = _noise(log_snr), _alpha(log_snr)
    late = LATE_WEIGHT if log_snr > LATE else 1
    return SPREAD / (alpha * math.hypot(SPREAD, noise)) * late


def _noise(log_snr: float) -> float:
    """sigma / alpha; lambda is -infinity at pure noise."""
    return math.exp(-max(log_snr, -30.0))


def _alpha(log_snr: float) -> float:
    return 1 / math.hypot(1, _noise(log_snr))
