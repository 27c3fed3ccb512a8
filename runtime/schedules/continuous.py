"""Schedules given by a formula: VP with linear beta or cosine, VE, and flow matching."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from sidestep.runtime.schedules.base import Array, Schedule, VariancePreserving


@dataclass(frozen=True, kw_only=True)
class LinearVP(VariancePreserving):
    """Continuous VP with linear beta: ``ln alpha = -(b1 - b0) t^2 / 4 - b0 t / 2``.

    Attributes:
        beta_0: ``b0``.
        beta_1: ``b1``.
        t_min: The last time at which the model is called (1e-3 up to 15 calls, 1e-4 above).
        time_scale: The model is told ``time_scale * t``.
    """

    beta_0: float = 0.1
    beta_1: float = 20.0
    t_min: float = 1e-3
    time_scale: float = 1.0

    @property
    def finite(self) -> tuple[float, float]:
        return self.t_min, self.t_max

    def log_alpha(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        return -0.25 * (self.beta_1 - self.beta_0) * t**2 - 0.5 * self.beta_0 * t

    def t_from_log_alpha(self, log_alpha: ArrayLike) -> Array:
        loss = -np.asarray(log_alpha, dtype=np.float64)
        half = 0.5 * self.beta_0
        return 2.0 * loss / (half + np.sqrt(half**2 + (self.beta_1 - self.beta_0) * loss))

    def model_time(self, t: float) -> float:
        return self.time_scale * float(t)


@dataclass(frozen=True, kw_only=True)
class CosineVP(VariancePreserving):
    """Continuous cosine VP: ``alpha = cos(pi/2 (t+s)/(1+s)) / cos(pi/2 s/(1+s))``.

    Attributes:
        s: The offset.
        t_min: The last time at which the model is called.
        t_max: The noisy end; at 1 the signal vanishes, 0.9946 is the published choice.
        time_scale: The model is told ``time_scale * t``.
    """

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946
    time_scale: float = 1.0

    @property
    def finite(self) -> tuple[float, float]:
        return self.t_min, min(self.t_max, 1.0 - 1e-3)

    def log_alpha(self, t: ArrayLike) -> Array:
        angle = 0.5 * np.pi * (np.asarray(t, dtype=np.float64) + self.s) / (1.0 + self.s)
        with np.errstate(divide="ignore"):
            log_cos = np.log(np.sin(np.maximum(0.5 * np.pi - angle, 0.0)))
        return np.minimum(log_cos - self._log_cos_0, 0.0)

    def t_from_log_alpha(self, log_alpha: ArrayLike) -> Array:
        cosine = np.exp(np.asarray(log_alpha, dtype=np.float64) + self._log_cos_0)
        return np.maximum(np.arccos(cosine) * 2.0 * (1.0 + self.s) / np.pi - self.s, 0.0)

    @property
    def _log_cos_0(self) -> float:
        return float(np.log(np.cos(0.5 * np.pi * self.s / (1.0 + self.s))))

    def model_time(self, t: float) -> float:
        return self.time_scale * float(t)


@dataclass(frozen=True, kw_only=True)
class VarianceExploding(Schedule):
    """``alpha = 1``, and time is sigma itself.

    Attributes:
        sigma_min: The last sigma at which the model is called.
        sigma_max: The noisy end.
        conditioning: What the model is told: ``sigma``, or ``edm`` for ``ln(sigma) / 4``.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    conditioning: str = "sigma"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"VarianceExploding: sigma_min is {self.sigma_min} and sigma_max "
                f"{self.sigma_max}, expected 0 < sigma_min < sigma_max"
            )
        if self.conditioning not in ("sigma", "edm"):
            raise ValueError(
                f"VarianceExploding: conditioning is {self.conditioning!r}, expected sigma or edm"
            )

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def finite(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def alpha(self, t: ArrayLike) -> Array:
        return np.ones_like(np.asarray(t, dtype=np.float64))

    def sigma(self, t: ArrayLike) -> Array:
        return np.array(t, dtype=np.float64)

    def log_snr(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return -np.log(np.asarray(t, dtype=np.float64))

    def t_from_log_snr(self, log_snr: ArrayLike) -> Array:
        return np.exp(-np.asarray(log_snr, dtype=np.float64))

    def model_time(self, t: float) -> float:
        return float(0.25 * np.log(t)) if self.conditioning == "edm" else float(t)

    def initial_scale(self, t: float) -> float:
        return float(t)


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Schedule):
    """Rectified flow: ``alpha = 1 - sigma``, ``sigma = shift t / (1 + (shift - 1) t)``.

    Attributes:
        shift: Moves even times towards noise (3 in Stable Diffusion 3; 1 for none).
        time_scale: The model is told ``time_scale * sigma``.
    """

    shift: float = 1.0
    time_scale: float = 1000.0
    t_min = 0.0
    finite = (1e-3, 1.0 - 1e-3)

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"FlowMatching: shift is {self.shift}, expected a number above 0")

    def sigma(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def alpha(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        return (1.0 - t) / (1.0 + (self.shift - 1.0) * t)

    def log_snr(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        with np.errstate(divide="ignore"):
            return np.log(1.0 - t) - np.log(self.shift * t)

    def t_from_log_snr(self, log_snr: ArrayLike) -> Array:
        with np.errstate(over="ignore"):
            return 1.0 / (1.0 + self.shift * np.exp(np.asarray(log_snr, dtype=np.float64)))

    def noise_level(self, t: ArrayLike) -> Array:
        return self.sigma(t)

    def t_from_noise_level(self, level: ArrayLike) -> Array:
        level = np.asarray(level, dtype=np.float64)
        return level / (self.shift - (self.shift - 1.0) * level)

    def model_time(self, t: float) -> float:
        return float(self.time_scale * self.sigma(t))

    def initial_scale(self, t: float) -> float:
        return float(self.sigma(t))
