"""Targets whose exact predictions and exact trajectories are known, in float64.

A mixture of Gaussians in one dimension, applied to every element on its own: for
``x = alpha x0 + sigma eps`` with ``x0 ~ sum_k w_k N(mu_k, s_k^2)`` the posterior mean is a ratio of
Gaussians, and the exact ODE map is quantile transport, ``x_t = F_t^{-1}(F_s(x_s))``. One component
gives the Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sidestep.runtime.plan import Plan
from sidestep.runtime.schedules import (
    CosineVP,
    DiscreteVP,
    FlowMatching,
    LinearVP,
    Schedule,
    VarianceExploding,
)


@dataclass(frozen=True)
class Mixture:
    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def _components(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """Per component: weight given x, posterior mean, and the argument of the normal CDF."""
        logs, posterior, standard = [], [], []
        for w, mu, s in zip(self.weights, self.means, self.stds, strict=True):
            variance = alpha**2 * s**2 + sigma**2
            z = (x - alpha * mu) / math.sqrt(variance)
            logs.append(math.log(w) - 0.5 * math.log(variance) - 0.5 * z**2)
            posterior.append((alpha * s**2 * x + sigma**2 * mu) / variance)
            standard.append(z)
        return torch.softmax(torch.stack(logs), 0), torch.stack(posterior), torch.stack(standard)

    def data(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        gamma, posterior, _ = self._components(x, alpha, sigma)
        return (gamma * posterior).sum(0)

    def output(self, kind: str, x: Tensor, alpha: float, sigma: float) -> Tensor:
        x0 = self.data(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": alpha * eps - sigma * x0,
            "flow_prediction": eps - x0,
            "score": -eps / sigma,
        }[kind]

    def cdf(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        _, _, standard = self._components(x, alpha, sigma)
        weights = torch.tensor(self.weights, dtype=x.dtype).view(-1, *[1] * x.dim())
        return (weights * torch.special.ndtr(standard)).sum(0)

    def transport(self, x: Tensor, schedule: Schedule, s: float, t: float) -> Tensor:
        """The exact ODE solution from time ``s`` to ``t``."""
        level = self.cdf(x, float(schedule.alpha(s)), float(schedule.sigma(s)))
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        low, high = torch.full_like(x, -40.0), torch.full_like(x, 40.0)
        for _ in range(70):
            middle = 0.5 * (low + high)
            below = self.cdf(middle, alpha, sigma) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)

    def model(self, schedule: Schedule, kind: str = "epsilon") -> Callable[[Tensor, float], Tensor]:
        """What a perfect network of that prediction type would return."""

        def call(x: Tensor, model_time: float) -> Tensor:
            t = schedule_time(schedule, model_time)
            return self.output(kind, x, float(schedule.alpha(t)), float(schedule.sigma(t)))

        return call

    @property
    def mean(self) -> float:
        return sum(w * mu for w, mu in zip(self.weights, self.means, strict=True))


GAUSSIAN = Mixture((1.0,), (0.3,), (0.5,))
MIXTURE = Mixture((0.35, 0.65), (-0.8, 0.6), (0.25, 0.4))


def schedule_time(schedule: Schedule, model_time: float) -> float:
    """The schedule's time of what the model was told."""
    if isinstance(schedule, DiscreteVP):
        return (model_time + 1.0) / schedule.train_steps
    if isinstance(schedule, FlowMatching):
        return float(schedule.t_from_noise_level(model_time / schedule.time_scale))
    if isinstance(schedule, VarianceExploding):
        return math.exp(4 * model_time) if schedule.conditioning == "edm" else model_time
    assert isinstance(schedule, LinearVP | CosineVP)
    return model_time / schedule.time_scale


def start(count: int = 41, spread: float = 2.5) -> Tensor:
    """Evenly spread starting values, ``[1, count]`` float64."""
    return torch.linspace(-spread, spread, count, dtype=torch.float64)[None]


def unroll(plan: Plan) -> tuple[list[list[float]], list[list[float]]]:
    """The latent before every step and at the end, as coefficients of ``[x_0, u_0, u_1, ...]``.

    Returns:
        The rows for the latents ``x_0 .. x_K``, and the rows for the model inputs.
    """
    basis = torch.eye(len(plan) + 1, dtype=torch.float64)
    inputs: list[list[float]] = []

    def model(x: Tensor, t: float) -> Tensor:
        inputs.append(x[0].tolist())
        return basis[len(inputs)][None]

    latents = [basis[0].tolist()]
    noise = torch.zeros(len(plan), plan.noise_columns, 1, len(plan) + 1, dtype=torch.float64)
    plan.run(model, basis[0][None], noise, lambda k, x: latents.append(x[0].tolist()))
    return latents, inputs


def gaussian_law(plan: Plan, target: Mixture, schedule: Schedule) -> tuple[float, float]:
    """Mean and standard deviation of the last latent for one Gaussian, without sampling.

    The exact noise prediction is affine in ``x``, so the registers stay jointly Gaussian and every
    step maps their mean and covariance.
    """
    (mu,), (s,) = target.means, target.stds
    registers = plan.registers
    t = schedule_time(schedule, float(plan.timesteps[0]))
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    mean, covariance = np.zeros(registers), np.zeros((registers, registers))
    scale = float(plan.input_scales[0])
    mean[0], covariance[0, 0] = alpha * mu / scale, (alpha**2 * s**2 + sigma**2) / scale**2
    for k in range(len(plan)):
        t = schedule_time(schedule, float(plan.timesteps[k]))
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        gain = sigma / (alpha**2 * s**2 + sigma**2)  # eps = gain (scale x - alpha mu)
        step = plan.matrices[k]
        linear = step[:, :registers].copy()
        linear[:, 0] += gain * float(plan.input_scales[k]) * step[:, registers]
        mean = linear @ mean - gain * alpha * mu * step[:, registers]
        noise = step[:, registers + 1 :]
        covariance = linear @ covariance @ linear.T + noise @ noise.T
    return float(mean[0]), float(np.sqrt(covariance[0, 0]))
