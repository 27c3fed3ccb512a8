"""Plans against an independent transcription of the published update formulas.

The formulas are those of the official DPM-Solver code and of diffusers, in their own form (A, B_j
with phi_1, phi_2, phi_3 of the step), not in the moments that `sidestep.runtime.solvers` uses.
``q`` is -1 for the data prediction and +1 for the noise prediction; ``m0`` is the newest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sidestep.runtime.grids import LogSNR, TimeUniform
from sidestep.runtime.schedules import LinearVP
from sidestep.runtime.solvers import Solver

SCHEDULE = LinearVP()
GRID = TimeUniform(final=0.02)
Value = Callable[[Tensor, float], Tensor]


class Step:
    """The quantities of one step from time ``s`` to time ``t``."""

    def __init__(self, s: float, t: float, q: int) -> None:
        self.lam_s, self.lam_t = (float(SCHEDULE.log_snr(v)) for v in (s, t))
        alpha_s, alpha_t = (float(SCHEDULE.alpha(v)) for v in (s, t))
        sigma_s, sigma_t = (float(SCHEDULE.sigma(v)) for v in (s, t))
        self.q, self.h = q, self.lam_t - self.lam_s
        self.A = sigma_t / sigma_s if q < 0 else alpha_t / alpha_s
        self.W = alpha_t if q < 0 else sigma_t
        self.alpha_t, self.sigma_t = alpha_t, sigma_t
        self.phi1 = math.exp(q * self.h) - 1
        self.phi2 = self.phi1 / self.h - q
        self.phi3 = self.phi2 / self.h - 0.5


def multistep(
    value: Value, x: Tensor, times: list[float], q: int, order: int, heun: bool, kappa: float
) -> Tensor:
    history: list[Tensor] = []
    for i, (s, t) in enumerate(pairwise(times)):
        d = Step(s, t, q)
        W, p1, p2, p3 = d.W, d.phi1, d.phi2, d.phi3
        history.insert(0, value(x, s))
        m0 = history[0]
        if order == 1 or i == 0:
            x = d.A * x - W * p1 * m0
            continue
        h0 = d.lam_s - float(SCHEDULE.log_snr(times[i - 1]))
        r0, m1 = h0 / d.h, history[1]
        if order == 2 or i == 1:
            if heun:
                x = d.A * x + (-W * p1 - q * W * p2 / r0) * m0 + q * W * p2 / r0 * m1
            else:
                x = d.A * x - W * p1 * (1 + 1 / (2 * r0)) * m0 + W * p1 / (2 * r0) * m1
            continue
        h1 = float(SCHEDULE.log_snr(times[i - 1]) - SCHEDULE.log_snr(times[i - 2]))
        r1, m2 = h1 / d.h, history[2]
        c = 1 / (r0 + r1)
        g0 = -q * W * p2 * (1 + r0 * c) - kappa * W * p3 * c
        g1 = q * W * p2 * r0 * c + kappa * W * p3 * c
        x = d.A * x + (-W * p1 + g0 / r0) * m0 + (-g0 / r0 + g1 / r1) * m1 - g1 / r1 * m2
    return x


def singlestep(
    value: Value, x: Tensor, times: list[float], q: int, order: int, heun: bool
) -> Tensor:
    for s, t in pairwise(times):
        d = Step(s, t, q)
        inner = [float(SCHEDULE.t_from_log_snr(d.lam_s + d.h * i / order)) for i in range(1, order)]
        W, p1, p2, p3 = d.W, d.phi1, d.phi2, d.phi3
        m_s, first = value(x, s), Step(s, inner[0], q)
        m_1 = value(first.A * x - first.W * first.phi1 * m_s, inner[0])
        if order == 2:
            r1 = 0.5
            b1 = -q * W * p2 / r1 if heun else -W * p1 / (2 * r1)
            x = d.A * x + (-W * p1 - b1) * m_s + b1 * m_1
            continue
        r1, r2 = 1 / 3, 2 / 3
        second = Step(s, inner[1], q)
        slope = q * (r2 / r1) * second.W * second.phi2
        u2 = second.A * x + (-second.W * second.phi1 + slope) * m_s - slope * m_1
        m_2 = value(u2, inner[1])
        if heun:
            e = 1 / (r2 - r1)
            b1 = (-q * W * p2 * r2 + 2 * W * p3) * e / r1
            b2 = (q * W * p2 * r1 - 2 * W * p3) * e / r2
        else:
            b1, b2 = 0.0, -q * W * p2 / r2
        x = d.A * x + (-W * p1 - b1 - b2) * m_s + b1 * m_1 + b2 * m_2
    return x


def sde(value: Value, x: Tensor, times: list[float], q: int, heun: bool, noise: Tensor) -> Tensor:
    previous = None
    for i, (s, t) in enumerate(pairwise(times)):
        d, m0 = Step(s, t, q), value(x, s)
        if q < 0:
            P = 1 - math.exp(-2 * d.h)
            A, C = d.A * math.exp(-d.h), d.sigma_t * math.sqrt(P)
            b = d.alpha_t * P
            slope = d.alpha_t * (1 - P / (2 * d.h)) if heun else d.alpha_t * P / 2
        else:
            grow = math.exp(d.h) - 1
            A, C = d.A, d.sigma_t * math.sqrt(math.exp(2 * d.h) - 1)
            b = -2 * d.sigma_t * grow
            slope = -2 * d.sigma_t * (grow / d.h - 1) if heun else -d.sigma_t * grow
        x = A * x + b * m0 + C * noise[i, 0]
        if previous is not None:
            r0 = (d.lam_s - float(SCHEDULE.log_snr(times[i - 1]))) / d.h
            x = x + slope * (m0 - previous) / r0
        previous = m0
    return x


def model(u: str) -> Value:
    """A smooth function of latent and time, as the prediction itself."""

    def call(x: Tensor, t: float) -> Tensor:
        return torch.sin(1.3 * x + t) + 0.2 * x

    return call


def _agree(plan, expected: Tensor, x: Tensor, noise: Tensor | None = None) -> None:
    found = plan.run(model(plan.name), x, noise)
    assert float((found - expected).abs().max()) < 1e-11


ALGORITHMS = {"dpmsolver++": ("sample", -1), "dpmsolver": ("epsilon", 1)}


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep(analytic, order: int, algorithm: str, heun: bool) -> None:
    prediction, q = ALGORITHMS[algorithm]
    x, times = analytic.start(), GRID.times(SCHEDULE, 8).tolist()
    for third, kappa in (("shipped", 1.0), ("true", 2.0)):
        solver = Solver(
            algorithm=algorithm,
            order=order,
            variant="heun" if heun else "midpoint",
            third_order=third,
            lower_order_final=False,
        )
        plan = solver.plan(SCHEDULE, GRID, 8, prediction)
        _agree(plan, multistep(model(""), x, times, q, order, heun, kappa), x)


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("order", [2, 3])
def test_singlestep(analytic, order: int, algorithm: str, heun: bool) -> None:
    prediction, q = ALGORITHMS[algorithm]
    solver = Solver(
        algorithm=algorithm,
        order=order,
        method="singlestep",
        variant="heun" if heun else "midpoint",
        inner="uniform",
        orders="fixed",
    )
    x, times = analytic.start(), GRID.times(SCHEDULE, 4).tolist()
    plan = solver.plan(SCHEDULE, GRID, 4 * order, prediction)
    _agree(plan, singlestep(model(""), x, times, q, order, heun), x)


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sde(analytic, algorithm: str, heun: bool) -> None:
    prediction, q = ALGORITHMS[algorithm]
    variant = "heun" if heun else "midpoint"
    solver = Solver(algorithm=algorithm, noise="sde", variant=variant, lower_order_final=False)
    x, times = analytic.start(), GRID.times(SCHEDULE, 8).tolist()
    noise = torch.randn(8, 1, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    plan = solver.plan(SCHEDULE, GRID, 8, prediction)
    _agree(plan, sde(model(""), x, times, q, heun, noise), x, noise)


def test_grid_and_uniform_inner_points_agree_on_a_log_snr_grid(analytic) -> None:
    x = analytic.start()
    for order in (2, 3):
        grid = LogSNR(final=0.02)
        base = Solver(method="singlestep", order=order, orders="fixed")
        runs = [
            base.replace(inner=inner).plan(SCHEDULE, grid, 12).run(model(""), x)
            for inner in ("grid", "uniform")
        ]
        assert float((runs[0] - runs[1]).abs().max()) < 1e-11


def test_ipndm_is_adams_bashforth(analytic) -> None:
    x, times = analytic.start(), GRID.times(SCHEDULE, 8).tolist()
    weights = [
        (1,),
        (3 / 2, -1 / 2),
        (23 / 12, -16 / 12, 5 / 12),
        (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    ]
    y, history = x, []
    for s, t in pairwise(times):
        d = Step(s, t, 1)
        history.insert(0, model("")(y, s))
        mixed = sum(w * e for w, e in zip(weights[min(len(history), 4) - 1], history, strict=False))
        y = d.A * y - d.W * d.phi1 * mixed
    _agree(
        Solver(algorithm="ipndm", order=4, lower_order_final=False).plan(SCHEDULE, GRID, 8), y, x
    )


def test_heun_is_the_trapezoidal_rule_in_sigma(analytic) -> None:
    x, times = analytic.start(), GRID.times(SCHEDULE, 4).tolist()
    y = x / float(SCHEDULE.alpha(times[0]))
    for s, t in pairwise(times):
        (a_s, g_s), (a_t, g_t) = (
            (float(SCHEDULE.alpha(v)), float(SCHEDULE.noise_level(v))) for v in (s, t)
        )
        d = model("")(a_s * y, s)
        euler = y + (g_t - g_s) * d
        y = y + (g_t - g_s) * 0.5 * (d + model("")(a_t * euler, t))
    for coordinates, scale in (("ve", 1.0), ("native", float(SCHEDULE.alpha(times[-1])))):
        plan = Solver(algorithm="heun", coordinates=coordinates).plan(SCHEDULE, GRID, 8)
        begin = x / float(SCHEDULE.alpha(times[0])) if coordinates == "ve" else x
        _agree(plan, y * scale, begin)
