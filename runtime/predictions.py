"""What a model's output means: each type as ``x0 = a x + b u`` and ``eps = c x + d u``.

``x = alpha x0 + sigma eps`` is what the model reads. The forms hold for any pair (alpha, sigma),
not only for the variance preserving ones, and are written such that nothing is divided by a
quantity that vanishes at an end where the prediction is still informative.

Source: DPM-Solver++ (Lu et al. 2022) section 2; v: Salimans and Ho 2022; EDM: Karras et al. 2022
Table 1; flow: Liu et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Affine = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One prediction type.

    Attributes:
        name: How users and diffusers call it.
        data: ``(a, b)`` of ``x0 = a x + b u`` from ``(alpha, sigma)``.
        noise: ``(c, d)`` of ``eps = c x + d u``.
        input_scale: What ``x`` is multiplied by on its way into the model, from ``sigma``. The
            forms act on ``x`` before that.
    """

    name: str
    data: Callable[[float, float], Affine]
    noise: Callable[[float, float], Affine]
    input_scale: Callable[[float], float] = lambda sigma: 1.0


def _energy(alpha: float, sigma: float) -> float:
    return alpha * alpha + sigma * sigma


EPSILON = Prediction(
    name="epsilon",
    data=lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    noise=lambda alpha, sigma: (0.0, 1.0),
)
SAMPLE = Prediction(
    name="sample",
    data=lambda alpha, sigma: (0.0, 1.0),
    noise=lambda alpha, sigma: (1 / sigma, -alpha / sigma),
)
# u = alpha eps - sigma x0
V = Prediction(
    name="v_prediction",
    data=lambda alpha, sigma: (alpha / _energy(alpha, sigma), -sigma / _energy(alpha, sigma)),
    noise=lambda alpha, sigma: (sigma / _energy(alpha, sigma), alpha / _energy(alpha, sigma)),
)
# u = eps - x0
FLOW = Prediction(
    name="flow_prediction",
    data=lambda alpha, sigma: (1 / (alpha + sigma), -sigma / (alpha + sigma)),
    noise=lambda alpha, sigma: (1 / (alpha + sigma), alpha / (alpha + sigma)),
)
# u = grad ln p(x) = -eps / sigma
SCORE = Prediction(
    name="score",
    data=lambda alpha, sigma: (1 / alpha, sigma * sigma / alpha),
    noise=lambda alpha, sigma: (0.0, -sigma),
)


def edm(sigma_data: float = 0.5) -> Prediction:
    """EDM's preconditioned network: ``x0 = c_skip x + c_out F(c_in x)``, for ``alpha = 1``."""

    def scale(sigma: float) -> float:
        return math.hypot(sigma, sigma_data)

    def data(alpha: float, sigma: float) -> Affine:
        _expect_exploding(alpha)
        return sigma_data**2 / scale(sigma) ** 2, sigma * sigma_data / scale(sigma)

    def noise(alpha: float, sigma: float) -> Affine:
        _expect_exploding(alpha)
        return sigma / scale(sigma) ** 2, -sigma_data / scale(sigma)

    return Prediction(
        name="edm", data=data, noise=noise, input_scale=lambda sigma: 1 / scale(sigma)
    )


def _expect_exploding(alpha: float) -> None:
    if alpha != 1.0:
        raise ValueError("prediction 'edm' needs a variance exploding schedule, alpha = 1")


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": EPSILON,
    "sample": SAMPLE,
    "v_prediction": V,
    "flow_prediction": FLOW,
    "score": SCORE,
    "edm": edm(),
    "v": V,
    "flow": FLOW,
}


def find_prediction(prediction: str | Prediction) -> Prediction:
    """The prediction type of that name.

    Raises:
        ValueError: There is none; the message lists them.
    """
    if isinstance(prediction, Prediction):
        return prediction
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"prediction {prediction!r} is unknown, expected one of {', '.join(PREDICTIONS)}"
        )
    return PREDICTIONS[prediction]
