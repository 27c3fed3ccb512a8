"""Moments of the plans' own tables: what each step integrates exactly, without any model.

With ``tau_j`` the log-SNR of the j-th value minus that of the step's start, a step of order p has
``sum_j B_j tau_j^k = integral_0^h K(tau) tau^k dtau`` for ``k < p``, where
``K = c alpha_t e^{c(tau-h)}`` for the data prediction and ``K = -c sigma_t e^{h-tau}`` for the
noise prediction (c = 1: ODE, 2: SDE). The integrals are taken by mpmath.
"""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from sidestep.runtime.grids import LogSNR, TimeUniform
from sidestep.runtime.predictions import PREDICTIONS
from sidestep.runtime.schedules import LinearVP
from sidestep.runtime.solvers import Solver
from sidestep.runtime.solvers.exponential import Integrator, phi
from sidestep.runtime.solvers.problem import Point, Problem

SCHEDULE = LinearVP()
GRID = TimeUniform(final=0.01)


def moment_ratios(analytic, solver: Solver, step: int, orders: int) -> list[float]:
    """For one step of a multistep plan, each moment divided by the exact one."""
    data = solver.algorithm in ("dpmsolver++", "unipc")
    problem = Problem(schedule=SCHEDULE, prediction=PREDICTIONS["sample"])
    plan = solver.plan(SCHEDULE, GRID, 12, prediction="sample" if data else "epsilon")
    s, t = problem.points(GRID, 12)[step : step + 2]
    h, eta = t.log_snr - s.log_snr, solver.eta if solver.stochastic else 0.0
    latents, _ = analytic.unroll(plan)
    decay = t.sigma / s.sigma * np.exp(-eta * h) if data else t.alpha / s.alpha
    weights = np.array(latents[step + 1]) - decay * np.array(latents[step])
    assert abs(weights[0]) < 1e-12  # nothing of the past but the values themselves
    taus = plan.log_snr - s.log_snr
    ratios = []
    for k in range(orders):
        exact = _integral(k, h, t, data, 1.0 + eta)
        ratios.append(float(np.dot(weights[1:], taus**k)) / exact)
    return ratios


def _integral(k: int, h: float, t: Point, data: bool, c: float) -> float:
    def kernel(tau):
        weight = c * t.alpha * mpmath.exp(c * (tau - h))
        return (weight if data else -c * t.sigma * mpmath.exp(h - tau)) * tau**k

    return float(mpmath.quad(kernel, [0, h]))


@pytest.mark.parametrize("noise", ["ode", "sde"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_multistep_moments(analytic, algorithm: str, noise: str) -> None:
    def ratios(orders: int, **settings: object) -> list[float]:
        solver = Solver(algorithm=algorithm, noise=noise, lower_order_final=False, **settings)
        return moment_ratios(analytic, solver, 7, orders)

    assert ratios(1, order=1) == pytest.approx([1.0], rel=1e-10)
    assert ratios(2, variant="heun") == pytest.approx([1.0, 1.0], rel=1e-10)
    assert ratios(3, order=3, third_order="true") == pytest.approx([1.0, 1.0, 1.0], rel=1e-9)
    assert ratios(3, order=3) == pytest.approx([1.0, 1.0, 0.5], rel=1e-9)
    midpoint = ratios(2)
    assert midpoint[0] == pytest.approx(1.0, rel=1e-10)
    assert midpoint[1] != pytest.approx(1.0, rel=1e-3) and abs(midpoint[1] - 1) < 0.25


@pytest.mark.parametrize("algorithm", ["unipc", "unipc-noise"])
def test_unipc_moments(analytic, algorithm: str) -> None:
    solver = Solver(algorithm=algorithm, order=3, corrector=False, lower_order_final=False)
    assert moment_ratios(analytic, solver, 7, 3) == pytest.approx([1.0] * 3, rel=1e-9)


def test_unipc_without_corrector_is_2m(analytic) -> None:
    two_m = Solver().plan(SCHEDULE, GRID, 9)
    unipc = Solver(algorithm="unipc", corrector=False).plan(SCHEDULE, GRID, 9)
    np.testing.assert_allclose(unipc.matrices, two_m.matrices, rtol=1e-12, atol=1e-14)


def test_deis_is_the_noise_solver_of_true_third_order(analytic) -> None:
    deis = Solver(algorithm="dpmsolver", order=3, variant="heun", third_order="true")
    unipc = Solver(algorithm="unipc-noise", order=3, corrector=False, lower_order_final=False)
    deis = deis.replace(lower_order_final=False)
    a, _ = analytic.unroll(deis.plan(SCHEDULE, GRID, 9))
    b, _ = analytic.unroll(unipc.plan(SCHEDULE, GRID, 9))
    # They differ in the one step of order 2 only: bh2 against heun.
    np.testing.assert_allclose(np.array(a[1])[:3], np.array(b[1])[:3], rtol=1e-12)
    last = [moment_ratios(analytic, solver, 7, 3) for solver in (deis, unipc)]
    assert last[0] == pytest.approx(last[1], rel=1e-9)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_functions_in_high_precision(k: int) -> None:
    for z in [0.0, *np.geomspace(1e-12, 30, 57)]:
        for signed in (z, -z):
            exact = mpmath.hyp1f1(1, k + 1, signed) / mpmath.factorial(k)
            assert phi(k, float(signed)) == pytest.approx(float(exact), rel=2e-13)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_moments_of_tiny_and_of_long_steps(data: bool, eta: float) -> None:
    """diffusers' float32 formulas are off by 13 % here at 500 steps (order 3)."""
    for h in (1e-9, 1e-3, 0.1, 1.0, 8.0, -1e-6, -0.3):
        s = Point(t=1.0, alpha=0.6, sigma=0.8, log_snr=0.0)
        t = Point(t=0.5, alpha=0.7, sigma=0.7 * np.exp(-h), log_snr=h)
        moments = Integrator(data=data, eta=eta).moments(s, t, 4)
        for k in range(4):
            exact = _integral(k, h, t, data, 1.0 + eta)
            assert moments[k] * h**k == pytest.approx(exact, rel=1e-12)


def test_second_moment_of_the_corrected_sde(analytic) -> None:
    """diffusers' sde-dpmsolver++ of order 3 has -0.5 for +0.5: its ratio is -9, not 0.5 or 1."""
    solver = Solver(order=3, noise="sde", lower_order_final=False)
    assert moment_ratios(analytic, solver, 9, 3)[2] == pytest.approx(0.5, rel=1e-9)


def test_noise_of_one_path_through_inner_points() -> None:
    """Two steps of noise, the first one decayed, have the variance of one long step."""
    problem = Problem(schedule=SCHEDULE, prediction=PREDICTIONS["epsilon"])
    s, middle, t = problem.points(LogSNR(), 6)[1:4]
    for data in (True, False):
        for eta in (0.3, 1.0):
            rule = Integrator(data=data, eta=eta)
            parts = (rule.decay(middle, t) * rule.noise(s, middle), rule.noise(middle, t))
            assert np.hypot(*parts) == pytest.approx(rule.noise(s, t), rel=1e-12)
