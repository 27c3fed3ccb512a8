"""The schedule of a model trained on N timesteps, as a function of continuous time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from sidestep.runtime.schedules.base import Array, VariancePreserving, log_alpha_from_log_snr


@dataclass(frozen=True, kw_only=True, eq=False)
class DiscreteVP(VariancePreserving):
    """A schedule trained on N timesteps, made continuous between them.

    Timestep ``n`` is the time ``t = (n + 1) / N``, and the model is told ``n = t N - 1``. Between
    timesteps one quantity is interpolated linearly; below the first it falls to ``sigma = 0`` at
    ``t = 0``. A last ``alphas_cumprod`` of 0 (zero terminal SNR) is allowed.

    Attributes:
        alphas_cumprod: ``[N]`` ``alpha^2`` at every training timestep, falling.
        interpolation: ``log_alpha`` (as DPM-Solver does), ``log_snr`` (as diffusers finds the
            timestep of a given sigma) or ``sigma`` (as diffusers' Euler finds the sigma of a
            fractional timestep).
        round_timesteps: Tell the model the nearest integer, as diffusers does.
        min_log_snr: Start no noisier than this lambda (-5.1 in the official code for cosine
            schedules), or None.

    Raises:
        ValueError: The table is not falling between 1 and 0, or a setting is unknown.
    """

    alphas_cumprod: Array
    interpolation: str = "log_alpha"
    round_timesteps: bool = False
    min_log_snr: float | None = None
    _times: Array = field(init=False, repr=False)
    _log_alphas: Array = field(init=False, repr=False)
    _values: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table = np.asarray(self.alphas_cumprod, dtype=np.float64)
        if table.ndim != 1 or len(table) < 2 or not (np.diff(table) < 0).all():
            raise ValueError("DiscreteVP: alphas_cumprod is not a falling sequence of 2 or more")
        if not (table[0] < 1 and table[-1] >= 0):
            raise ValueError("DiscreteVP: alphas_cumprod leaves [0, 1), expected 1 > value >= 0")
        if self.interpolation not in ("log_alpha", "log_snr", "sigma"):
            raise ValueError(
                f"DiscreteVP: interpolation is {self.interpolation!r}, "
                "expected log_alpha, log_snr or sigma"
            )
        if table[-1] == 0 and self.interpolation != "log_alpha":
            raise ValueError("DiscreteVP: zero terminal SNR needs interpolation='log_alpha'")
        with np.errstate(divide="ignore"):
            log_alphas = 0.5 * np.log(np.concatenate([[1.0], table]))
            log_snrs = log_alphas - 0.5 * np.log(-np.expm1(2.0 * log_alphas))
        values = {"log_alpha": -log_alphas, "log_snr": -log_snrs, "sigma": np.exp(-log_snrs)}
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "_times", np.arange(len(table) + 1) / len(table))
        object.__setattr__(self, "_log_alphas", log_alphas)
        object.__setattr__(self, "_values", values[self.interpolation])

    @property
    def train_steps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def t_min(self) -> float:
        return 1.0 / self.train_steps

    @property
    def t_max(self) -> float:
        if self.min_log_snr is None:
            return 1.0
        kept = int((self.log_snr(self._times[1:]) >= self.min_log_snr).sum())
        return max(kept, 2) / self.train_steps

    @property
    def finite(self) -> tuple[float, float]:
        zero_snr = self.alphas_cumprod[-1] == 0
        return self.t_min, min(self.t_max, 1.0 - (1.0 / self.train_steps if zero_snr else 0.0))

    def log_alpha(self, t: ArrayLike) -> Array:
        t = np.asarray(t, dtype=np.float64)
        if self.interpolation == "log_alpha":
            return self._interpolate_log_alpha(t)
        value = np.interp(t, self._times[1:], self._values[1:])
        negative_log_snr = value if self.interpolation == "log_snr" else np.log(value)
        inside = log_alpha_from_log_snr(-negative_log_snr)
        return np.where(t < self.t_min, self._interpolate_log_alpha(t), inside)

    def t_from_log_alpha(self, log_alpha: ArrayLike) -> Array:
        log_alpha = np.asarray(log_alpha, dtype=np.float64)
        below = np.interp(-log_alpha, -self._log_alphas[:2], self._times[:2])
        if self.interpolation == "log_alpha":
            inside = self._invert_log_alpha(log_alpha)
        else:
            with np.errstate(divide="ignore"):
                negative_log_snr = 0.5 * np.log(-np.expm1(2.0 * log_alpha)) - log_alpha
            level = self.interpolation == "sigma"
            wanted = np.exp(negative_log_snr) if level else negative_log_snr
            inside = np.interp(wanted, self._values[1:], self._times[1:])
        return np.where(log_alpha > self._log_alphas[1], below, inside)

    def _interpolate_log_alpha(self, t: Array) -> Array:
        last = self._log_alphas[-1]
        if np.isfinite(last):
            return np.interp(t, self._times, self._log_alphas)
        inside = np.interp(t, self._times[:-1], self._log_alphas[:-1])
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.clip((1.0 - t) * self.train_steps, 0.0, 1.0)
            return np.where(left < 1.0, self._log_alphas[-2] + np.log(left), inside)

    def _invert_log_alpha(self, log_alpha: Array) -> Array:
        if np.isfinite(self._log_alphas[-1]):
            return np.interp(-log_alpha, -self._log_alphas, self._times)
        inside = np.interp(-log_alpha, -self._log_alphas[:-1], self._times[:-1])
        tail = 1.0 - np.exp(log_alpha - self._log_alphas[-2]) / self.train_steps
        return np.where(log_alpha < self._log_alphas[-2], tail, inside)

    def model_time(self, t: float) -> float:
        index = float(t) * self.train_steps - 1.0
        whole = float(np.round(index))
        return whole if self.round_timesteps or abs(index - whole) < 1e-9 else index

    @classmethod
    def from_betas(
        cls, betas: ArrayLike, *, rescale_zero_snr: bool = False, **settings: object
    ) -> DiscreteVP:
        """From the per-timestep variances ``beta_n``, ``[N]``.

        Args:
            rescale_zero_snr: Shift and scale ``alpha`` so that the last one is 0 and the first
                stays (Lin et al. 2023, Algorithm 1).
        """
        alphas_cumprod = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))
        if rescale_zero_snr:
            alphas = np.sqrt(alphas_cumprod)
            alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
            alphas_cumprod = alphas**2
        return cls(alphas_cumprod=alphas_cumprod, **settings)  # type: ignore[arg-type]

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 2e-2, steps: int = 1000, **settings: object
    ) -> DiscreteVP:
        """Betas evenly spaced (DDPM)."""
        return cls.from_betas(np.linspace(beta_start, beta_end, steps), **settings)  # type: ignore[arg-type]

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        steps: int = 1000,
        **settings: object,
    ) -> DiscreteVP:
        """Square roots of the betas evenly spaced (Stable Diffusion)."""
        betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
        return cls.from_betas(betas, **settings)  # type: ignore[arg-type]

    @classmethod
    def squaredcos(
        cls, steps: int = 1000, max_beta: float = 0.999, s: float = 0.008, **settings: object
    ) -> DiscreteVP:
        """Cosine schedule with betas cut at ``max_beta`` (Nichol and Dhariwal 2021, eq. 17)."""
        grid = np.arange(steps + 1) / steps
        bar = np.cos((grid + s) / (1 + s) * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - bar[1:] / bar[:-1], max_beta), **settings)  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: Mapping[str, object], **settings: object) -> DiscreteVP:
        """From the fields of a diffusers scheduler's config: beta_schedule, beta_start, ....

        Raises:
            ValueError: The beta schedule is not one of linear, scaled_linear, squaredcos_cap_v2.
        """
        settings = {"rescale_zero_snr": bool(config.get("rescale_betas_zero_snr")), **settings}
        trained = config.get("trained_betas")
        if trained is not None:
            return cls.from_betas(trained, **settings)  # type: ignore[arg-type]
        name = config.get("beta_schedule", "linear")
        steps = int(config.get("num_train_timesteps", 1000))  # type: ignore[call-overload]
        if name == "squaredcos_cap_v2":
            return cls.squaredcos(steps=steps, **settings)  # type: ignore[arg-type]
        makers = {"linear": cls.linear, "scaled_linear": cls.scaled_linear}
        if name not in makers:
            raise ValueError(
                f"DiscreteVP.from_config: beta_schedule is {name!r}, expected linear, "
                "scaled_linear, squaredcos_cap_v2 or trained_betas"
            )
        start, end = config.get("beta_start", 1e-4), config.get("beta_end", 2e-2)
        return makers[name](float(start), float(end), steps, **settings)  # type: ignore
