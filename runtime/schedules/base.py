"""Noise schedules: how much signal (alpha) and noise (sigma) there is at each time.

Everywhere ``x_t = alpha(t) x_0 + sigma(t) eps`` and ``lambda(t) = ln(alpha(t) / sigma(t))``, half
the log signal-to-noise ratio. Time falls during sampling: ``t = 0`` is the clean end
(``sigma = 0``, ``lambda = +inf``) of every schedule, and ``t_max`` the noisy one (``lambda = -inf``
where the signal vanishes). At both ends ``alpha`` and ``sigma`` are ordinary numbers.

Source: DPM-Solver (Lu et al. 2022) section 2 and Appendix D; EDM (Karras et al. 2022) Table 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Schedule(ABC):
    """What grids and solvers ask of a schedule; times and results are scalars or arrays.

    Attributes:
        t_max: The noisiest time, where a full trajectory starts.
        t_min: The least noisy time of the grids that are spaced in time.
        finite: ``(lowest, highest)`` time between which grids spaced in sigma or lambda work.
        train_steps: The number of training timesteps of a discrete schedule, else None.
    """

    t_max: float = 1.0
    t_min: float
    finite: tuple[float, float]
    train_steps: int | None = None

    @abstractmethod
    def alpha(self, t: ArrayLike) -> Array:
        """The signal coefficient at ``t``."""

    @abstractmethod
    def sigma(self, t: ArrayLike) -> Array:
        """The noise coefficient at ``t``."""

    @abstractmethod
    def log_snr(self, t: ArrayLike) -> Array:
        """``lambda = ln(alpha / sigma)`` at ``t``; infinite at the ends."""

    @abstractmethod
    def t_from_log_snr(self, log_snr: ArrayLike) -> Array:
        """The inverse of `log_snr`."""

    @abstractmethod
    def model_time(self, t: float) -> float:
        """What the model is told at ``t``: a float, unrounded unless asked otherwise."""

    def noise_level(self, t: ArrayLike) -> Array:
        """The sigma that sigma grids are spaced in: ``sigma / alpha`` (flow matching: sigma)."""
        return np.exp(-self.log_snr(t))

    def t_from_noise_level(self, level: ArrayLike) -> Array:
        """The inverse of `noise_level`."""
        with np.errstate(divide="ignore"):
            return self.t_from_log_snr(-np.log(np.asarray(level, dtype=np.float64)))

    def initial_scale(self, t: float) -> float:
        """What unit noise is multiplied by to start at ``t``."""
        return 1.0


class VariancePreserving(Schedule):
    """``alpha^2 + sigma^2 = 1``: everything follows from ``ln alpha``."""

    @abstractmethod
    def log_alpha(self, t: ArrayLike) -> Array:
        """``ln alpha`` at ``t``, at most 0."""

    @abstractmethod
    def t_from_log_alpha(self, log_alpha: ArrayLike) -> Array:
        """The inverse of `log_alpha`."""

    def alpha(self, t: ArrayLike) -> Array:
        return np.exp(self.log_alpha(t))

    def sigma(self, t: ArrayLike) -> Array:
        return np.sqrt(-np.expm1(2.0 * self.log_alpha(t)))

    def log_snr(self, t: ArrayLike) -> Array:
        log_alpha = self.log_alpha(t)
        with np.errstate(divide="ignore"):
            return log_alpha - 0.5 * np.log(-np.expm1(2.0 * log_alpha))

    def t_from_log_snr(self, log_snr: ArrayLike) -> Array:
        return self.t_from_log_alpha(log_alpha_from_log_snr(log_snr))


def log_alpha_from_log_snr(log_snr: ArrayLike) -> Array:
    """``alpha^2 = 1 / (1 + exp(-2 lambda))`` under ``alpha^2 + sigma^2 = 1``."""
    return -0.5 * np.logaddexp(0.0, -2.0 * np.asarray(log_snr, dtype=np.float64))
