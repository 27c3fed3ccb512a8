"""The mathematics that the whole DPM-Solver family shares: exponential integrators in lambda.

In ``lambda`` the diffusion ODE and its reverse SDE are linear, so with ``h = lambda_t - lambda_s``

    x_t = A x_s + integral_0^h K(tau) m(lambda_s + tau) dtau + C z

exactly, where ``m`` is the model's data prediction (DPM-Solver++) or noise prediction
(DPM-Solver). A solver replaces ``m`` by a polynomial through known values at
``theta_j = tau_j / h``, so it is the quadrature rule ``sum_j B_j m_j`` whose moments
``sum_j B_j theta_j^k`` equal ``mu_k``, the integral of ``K (tau / h)^k``. With ``c = 1 + eta``
(eta = 0: ODE, 1: reverse SDE) and the phi functions below

    data   A = sigma_t / sigma_s e^(-eta h)   mu_k = +alpha_t c h k! phi_{k+1}(-c h)
    noise  A = alpha_t / alpha_s              mu_k = -sigma_t c h k! phi_{k+1}(h)

Source: DPM-Solver (Lu et al. 2022) Appendix B; DPM-Solver++ (Lu et al. 2022) Appendix A and B; the
eta family: k-diffusion, and SA-Solver (Xue et al. 2023) Proposition 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from sidestep.runtime.solvers.problem import Point


class Linear(Protocol):
    """Anything that a solver's arithmetic works on: a `Form`, or a tensor."""

    def __add__(self: V, other: V) -> V: ...

    def __mul__(self: V, factor: float) -> V: ...


V = TypeVar("V", bound=Linear)


def phi(k: int, z: float) -> float:
    """``phi_k(z) = sum_j z^j / (j + k)!``, that is ``(e^z - 1) / z`` for k = 1, and so on up.

    The series near 0 and the recurrence ``phi_{k+1} = (phi_k - 1/k!) / z`` elsewhere keep 13 digits
    or more for the k up to 4 that are used.
    """
    if abs(z) < 1.5:
        return sum(z**j / math.factorial(j + k) for j in range(24))
    value = math.expm1(z) / z
    for i in range(1, k):
        value = (value - 1.0 / math.factorial(i)) / z
    return value


@dataclass(frozen=True, kw_only=True)
class Integrator:
    """The coefficients of one step, from a point ``s`` to a point ``t``.

    Attributes:
        data: Whether ``m`` is the data prediction, else the noise prediction.
        eta: 0 for the ODE, 1 for the reverse SDE, in between for a mixture.
        ancestral: Instead of the SDE's own splitting, DDIM's: the same law at order 1 with
            ``eta`` 0 or 1, and DDIM's eta in between (DDIM, Song et al. 2021, eq. 16).
    """

    data: bool
    eta: float = 0.0
    ancestral: bool = False

    def decay(self, s: Point, t: Point) -> float:
        """``A``."""
        if not self.data:
            return t.alpha / s.alpha
        ratio = t.sigma / s.sigma
        return ratio * math.exp(-self.eta * (t.log_snr - s.log_snr)) if self.eta else ratio

    def moments(self, s: Point, t: Point, count: int) -> list[float]:
        """``mu_0 .. mu_{count-1}``; needs a finite ``h``."""
        h, c = t.log_snr - s.log_snr, 1.0 + self.eta
        z, weight = (-c * h, t.alpha) if self.data else (h, -t.sigma)
        return [weight * c * h * math.factorial(k) * phi(k + 1, z) for k in range(count)]

    def first_order(self, s: Point, t: Point, x0: V, eps: V) -> V:
        """``A x + mu_0 m`` without its noise, finite at both ends of every schedule.

        With ``x = alpha_s x0 + sigma_s eps`` it is ``alpha_t x0`` plus a multiple of ``eps``. A
        step to ``sigma_t = 0`` is ``x0`` in every algorithm.
        """
        return x0 * t.alpha + eps * self._noise_kept(s, t)

    def _noise_kept(self, s: Point, t: Point) -> float:
        if t.sigma == 0 or self.eta == 0:
            return t.sigma
        h = t.log_snr - s.log_snr
        if self.ancestral:
            return t.sigma * math.sqrt(1.0 + self.eta**2 * math.expm1(-2.0 * h))
        if self.data:
            return t.sigma * math.exp(-self.eta * h)
        return (1.0 + self.eta) * t.sigma - self.eta * t.alpha * s.sigma / s.alpha

    def noise(self, s: Point, t: Point) -> float:
        """``C``."""
        if t.sigma == 0 or self.eta == 0:
            return 0.0
        h = t.log_snr - s.log_snr
        if self.ancestral:
            return self.eta * t.sigma * math.sqrt(-math.expm1(-2.0 * h))
        if self.data:
            return t.sigma * math.sqrt(-math.expm1(-2.0 * self.eta * h))
        return t.sigma * math.sqrt(self.eta * math.expm1(2.0 * h))


def quadrature(thetas: Sequence[float], moments: Sequence[float]) -> list[float]:
    """``B_j`` with ``sum_j B_j theta_j^k = mu_k`` for ``k = 1 .. len(thetas)``.

    The weight of the newest value, at ``theta = 0``, is ``mu_0 - sum_j B_j``, so the sum is used as
    ``mu_0 m_0 + sum_j B_j (m_j - m_0)``.
    """
    count = len(thetas)
    if count == 0:
        return []
    if count == 1:
        return [moments[1] / thetas[0]]
    powers = np.array([[theta**k for theta in thetas] for k in range(1, count + 1)])
    return np.linalg.solve(powers, np.array(moments[1 : count + 1])).tolist()


def differences(weights: Sequence[float], values: Sequence[V], newest: V) -> V | None:
    """``sum_j B_j (m_j - m_0)``, or None for no terms."""
    total: V | None = None
    for weight, value in zip(weights, values, strict=True):
        term = value * weight + newest * -weight
        total = term if total is None else total + term
    return total
