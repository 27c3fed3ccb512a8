"""Empirical orders on targets with known exact trajectories, and the law of the SDE solvers."""

from __future__ import annotations

import math

import pytest

from sidestep.runtime.grids import LogSNR
from sidestep.runtime.schedules import DiscreteVP, LinearVP
from sidestep.runtime.solvers import SOLVERS, Solver

SCHEDULE = LinearVP()
START, END = (float(SCHEDULE.t_from_log_snr(value)) for value in (-3.0, 3.0))
GRID = LogSNR(start=START, final=END)
TOLERANCE = {1: 0.1, 2: 0.15, 3: 0.35, 4: 0.4}


def _dpm(**settings: object) -> dict[str, Solver]:
    return {
        f"{algorithm}-{'-'.join(str(v) for v in settings.values())}": Solver(
            algorithm=algorithm, **settings
        )
        for algorithm in ("dpmsolver++", "dpmsolver")
    }


ORDERS: dict[int, dict[str, Solver]] = {
    1: {**_dpm(order=1), "unipc-1-plain": Solver(algorithm="unipc", order=1, corrector=False)},
    2: {
        **_dpm(variant="midpoint"),
        **_dpm(variant="heun"),
        **_dpm(method="singlestep", variant="midpoint"),
        **_dpm(method="singlestep", variant="heun"),
        **_dpm(order=3, third_order="shipped"),
        "heun": Solver(algorithm="heun"),
        "unipc-1": Solver(algorithm="unipc", order=1),
        "unipc-2-plain": Solver(algorithm="unipc", corrector=False),
        "unipc-noise-1": Solver(algorithm="unipc-noise", order=1),
    },
    3: {
        **_dpm(order=3, third_order="true", start_order="singlestep", lower_order_final=False),
        **_dpm(order=3, method="singlestep", variant="midpoint", orders="fixed"),
        **_dpm(order=3, method="singlestep", variant="heun", inner="uniform", orders="fixed"),
        "unipc-2-bh1": Solver(algorithm="unipc", variant="bh1", lower_order_final=False),
        "unipc-2-bh2": Solver(algorithm="unipc", lower_order_final=False),
        "unipc-noise-2": Solver(algorithm="unipc-noise", lower_order_final=False),
    },
    4: {
        "unipc-3": Solver(algorithm="unipc", order=3, lower_order_final=False),
        "unipc-noise-3": Solver(algorithm="unipc-noise", order=3, lower_order_final=False),
    },
}


@pytest.mark.parametrize(
    ("order", "name"), [(order, name) for order, group in ORDERS.items() for name in group]
)
def test_order_on_the_mixture(analytic, order: int, name: str) -> None:
    solver, x = ORDERS[order][name], analytic.start()
    exact = analytic.MIXTURE.transport(x, SCHEDULE, START, END)
    errors = []
    for steps in (96, 192):
        plan = solver.plan(SCHEDULE, GRID, steps)
        assert len(plan) == steps
        result = plan.run(analytic.MIXTURE.model(SCHEDULE), x)
        errors.append(float((result - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=TOLERANCE[order])


def test_a_first_order_end_costs_the_third_order(analytic) -> None:
    """Why `dpmsolver++3m-true` sets lower_order_final to False."""
    solver, x = SOLVERS["dpmsolver++3m-true"], analytic.start()
    exact = analytic.MIXTURE.transport(x, SCHEDULE, START, END)
    errors = [
        (s.plan(SCHEDULE, GRID, 192).run(analytic.MIXTURE.model(SCHEDULE), x) - exact).abs().max()
        for s in (solver, solver.replace(lower_order_final=True))
    ]
    assert errors[0] < 0.6 * errors[1]


def test_gaussian_transport_is_the_closed_form(analytic) -> None:
    """The reference itself: ``x_t = alpha_t mu + sqrt(V_t / V_s) (x_s - alpha_s mu)``."""
    x = analytic.start()
    (mu,), (std,) = analytic.GAUSSIAN.means, analytic.GAUSSIAN.stds
    (a_s, g_s), (a_t, g_t) = (
        (float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))) for t in (START, END)
    )
    v_s, v_t = a_s**2 * std**2 + g_s**2, a_t**2 * std**2 + g_t**2
    exact = a_t * mu + math.sqrt(v_t / v_s) * (x - a_s * mu)
    found = analytic.GAUSSIAN.transport(x, SCHEDULE, START, END)
    assert float((exact - found).abs().max()) < 1e-9


SDE = {
    "++1": (1, Solver(order=1, noise="sde")),
    "++1-eta": (1, Solver(order=1, noise="sde", eta=0.5)),
    "ancestral": (1, Solver(order=1, noise="ancestral")),
    "ancestral-eta": (1, Solver(order=1, noise="ancestral", eta=0.5)),
    "++2m": (2, Solver(noise="sde")),
    "++2m-eta": (2, Solver(noise="sde", eta=0.5)),
    "++2m-heun": (2, Solver(noise="sde", variant="heun")),
    "++3m": (2, Solver(order=3, noise="sde")),
    "++3m-true": (2, Solver(order=3, noise="sde", third_order="true", lower_order_final=False)),
    "++2s": (2, Solver(noise="sde", method="singlestep")),
    "++2s-heun": (2, Solver(noise="sde", method="singlestep", variant="heun")),
    "2m": (2, Solver(algorithm="dpmsolver", noise="sde")),
    "2m-heun": (2, Solver(algorithm="dpmsolver", noise="sde", variant="heun")),
    "3m": (2, Solver(algorithm="dpmsolver", noise="sde", order=3)),
}


@pytest.mark.parametrize("name", SDE)
def test_law_of_the_sde_solvers(analytic, name: str) -> None:
    """Mean exact, standard deviation converging at the weak order, on a Gaussian, no sampling."""
    order, solver = SDE[name]
    alpha, sigma = float(SCHEDULE.alpha(END)), float(SCHEDULE.sigma(END))
    expected = math.hypot(alpha * 0.5, sigma)
    errors = []
    for steps in (96, 192):
        plan = solver.plan(SCHEDULE, GRID, steps)
        mean, std = analytic.gaussian_law(plan, analytic.GAUSSIAN, SCHEDULE)
        assert mean == pytest.approx(alpha * 0.3, abs=1e-12)
        errors.append(abs(std - expected))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    assert errors[1] < {1: 9e-3, 2: 6e-4}[order]


def test_sde_law_at_few_steps_is_the_measured_one(analytic) -> None:
    """Standard deviation errors on Stable Diffusion's schedule with karras (facts, 3.4)."""
    schedule = DiscreteVP.scaled_linear()

    def error(name: str, steps: int) -> float:
        solver = SOLVERS[name].replace(lower_order_final=15)
        plan = solver.plan(schedule, "karras", steps)
        return analytic.gaussian_law(plan, analytic.GAUSSIAN, schedule)[1] - 0.5

    found = [error("sde-dpmsolver++2m", n) for n in (10, 20, 50)]
    assert found == pytest.approx([4.0e-2, 1.7e-2, 1.9e-3], rel=0.05)
    found = [error("sde-dpmsolver++3m", n) for n in (10, 20, 50)]
    assert found == pytest.approx([2.0e-1, 8.8e-3, 4.6e-4], rel=0.05)


def test_eta_zero_is_the_ode() -> None:
    for settings in ({"order": 1}, {}, {"order": 3}, {"method": "singlestep"}):
        ode = Solver(**settings).plan(SCHEDULE, GRID, 8, name="same")
        assert Solver(noise="sde", eta=0.0, **settings).plan(SCHEDULE, GRID, 8, name="same") == ode


def test_ancestral_and_sde_agree_at_order_1_and_full_noise() -> None:
    a = Solver(order=1, noise="sde").plan(SCHEDULE, GRID, 8)
    b = Solver(order=1, noise="ancestral").plan(SCHEDULE, GRID, 8)
    assert abs(a.matrices - b.matrices).max() < 1e-13
