"""Solvers as a whole: names, ends of the schedules, prediction types, options, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from sidestep.runtime.grids import GRIDS, Karras, LogSNR, TimeUniform
from sidestep.runtime.predictions import edm
from sidestep.runtime.schedules import (
    CosineVP,
    DiscreteVP,
    FlowMatching,
    Schedule,
    VarianceExploding,
)
from sidestep.runtime.solvers import SOLVERS, Solver
from sidestep.runtime.thresholding import DynamicThreshold

SD = DiscreteVP.scaled_linear()
SCHEDULES: dict[str, Schedule] = {
    "discrete": SD,
    "cosine": CosineVP(),
    "zero_snr": DiscreteVP.scaled_linear(rescale_zero_snr=True),
    "ve": VarianceExploding(),
    "flow": FlowMatching(shift=3.0),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_makes_exactly_the_calls_and_comes_close(analytic, name: str) -> None:
    solver, x = SOLVERS[name], analytic.start()
    for steps in (1, 2, 3, 7, 24):
        for final in ("zero", "sigma_min"):
            plan = solver.plan(SD, replace(GRIDS["lu"], final=final), steps)
            assert len(plan) == steps
            assert plan.log_snr is not None and plan.name == solver.label
            assert plan.stochastic == (solver.stochastic and not (steps == 1 and final == "zero"))
    plan = solver.plan(SD, "lu", 24)
    if solver.stochastic:
        mean, std = analytic.gaussian_law(plan, analytic.GAUSSIAN, SD)
        assert (mean, std) == (pytest.approx(0.3, abs=1e-4), pytest.approx(0.5, abs=0.065))
        return
    exact = analytic.GAUSSIAN.transport(x, SD, 1.0, 0.0)
    begin = x * plan.initial_scale
    error = (plan.run(analytic.GAUSSIAN.model(SD), begin) - exact).abs().max()
    limits = {"ddim": 0.1, "euler": 0.1, "heun": 0.06}
    assert float(error) < limits.get(name, 0.03)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("grid", GRIDS)
def test_both_ends_of_every_schedule_are_finite(analytic, grid: str, schedule: str) -> None:
    where = SCHEDULES[schedule]
    if (grid == "leading" and where.train_steps is None) or (grid, schedule) == (
        "flow-shift",
        "ve",
    ):
        return  # refused, as test_grids shows
    names = set(SOLVERS) - {"sde-dpmsolver2m"}
    if schedule == "zero_snr":
        names -= {"euler", "euler-ancestral", "heun"}  # their coordinates divide by alpha
    if schedule == "flow":
        names -= {"euler", "euler-ancestral", "heun"}
    for name in sorted(names):
        plan = SOLVERS[name].plan(where, grid, 6, "v_prediction")
        assert np.isfinite(plan.matrices).all() and len(plan) == 6
    plan = SOLVERS["dpmsolver++2m"].plan(where, grid, 9, "v_prediction")
    x = analytic.start(5) * plan.initial_scale
    last = plan.run(analytic.GAUSSIAN.model(where, "v_prediction"), x)
    assert bool(torch.isfinite(last).all())


@pytest.mark.parametrize("name", ["zero_snr", "flow"])
def test_the_first_step_from_no_signal_is_exact_ddim(name: str) -> None:
    """From ``alpha = 0`` every solver starts with ``alpha_t x0 + sigma_t eps``."""
    where = SCHEDULES[name]
    for solver in ("ddim", "dpmsolver++3m", "dpmsolver2m", "unipc2", "dpmsolver++2s", "ipndm"):
        plan = SOLVERS[solver].plan(where, "linspace", 6, "v_prediction")
        t = float(where.t_from_log_snr(plan.log_snr[1]))
        # v at alpha = 0, sigma = 1: x0 = -u, eps = x
        row = plan.matrices[0, 0]
        assert row[0] == pytest.approx(float(where.sigma(t)), rel=1e-12)
        assert row[plan.registers] == pytest.approx(-float(where.alpha(t)), rel=1e-12)


def test_epsilon_at_no_signal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"predicts 'epsilon' cannot be called at time 1\.0"):
        SOLVERS["ddim"].plan(SCHEDULES["zero_snr"], "linspace", 6)
    with pytest.raises(ValueError, match="coordinates 've' divide by alpha"):
        SOLVERS["euler"].plan(SCHEDULES["zero_snr"], "linspace", 6, "v_prediction")


@pytest.mark.parametrize("name", ["dpmsolver++2m", "dpmsolver3m", "unipc2", "heun", "ipndm"])
def test_prediction_types_are_the_same_trajectory(analytic, name: str) -> None:
    x = analytic.start()
    for schedule in (SD, FlowMatching(), VarianceExploding(sigma_max=20.0)):
        grid = TimeUniform(start=0.9 * schedule.t_max, final=0.05)
        runs = []
        for kind in ("epsilon", "sample", "v_prediction", "flow_prediction", "score"):

            def network(y, t, kind=kind, schedule=schedule):
                at = analytic.schedule_time(schedule, t)
                alpha, sigma = float(schedule.alpha(at)), float(schedule.sigma(at))
                x0 = analytic.MIXTURE.data(y, alpha, sigma)
                eps = (y - alpha * x0) / sigma
                return {
                    "epsilon": eps,
                    "sample": x0,
                    "v_prediction": alpha * eps - sigma * x0,
                    "flow_prediction": eps - x0,
                    "score": -eps / sigma,
                }[kind]

            plan = SOLVERS[name].plan(schedule, grid, 8, kind)
            runs.append(plan.run(network, x * plan.initial_scale))
        for other in runs[1:]:
            assert float((runs[0] - other).abs().max()) < 1e-9


def test_coordinates_are_the_same_trajectory(analytic) -> None:
    x = analytic.start()
    for name in ("ddim", "dpmsolver++2m", "unipc2", "dpmsolver++2s", "ipndm"):
        native, scaled = (
            SOLVERS[name].replace(coordinates=c).plan(SD, "karras", 9) for c in ("native", "ve")
        )
        assert scaled.initial_scale == pytest.approx(math.hypot(1, 14.6146), rel=1e-4)
        np.testing.assert_allclose(scaled.input_scales, SD.alpha(scaled_times(scaled)), rtol=1e-9)
        a, b = (p.run(analytic.MIXTURE.model(SD), x * p.initial_scale) for p in (native, scaled))
        assert float((a - b).abs().max()) < 1e-10


def scaled_times(plan) -> np.ndarray:
    return SD.t_from_log_snr(plan.log_snr)


def test_edm_preconditioning(analytic) -> None:
    """``D(x) = c_skip x + c_out F(c_in x)`` with Karras' constants gives back the denoiser."""
    schedule, data_std = VarianceExploding(conditioning="edm"), 0.5
    x = analytic.start() * 80.0

    def network(scaled, noise_label):
        sigma = math.exp(4 * noise_label)
        c_in = 1 / math.hypot(sigma, data_std)
        c_skip = data_std**2 / (sigma**2 + data_std**2)
        c_out = sigma * data_std / math.hypot(sigma, data_std)
        y = scaled / c_in
        return (analytic.MIXTURE.data(y, 1.0, sigma) - c_skip * y) / c_out

    plain = lambda y, sigma: analytic.MIXTURE.data(y, 1.0, sigma)  # noqa: E731
    for name in ("dpmsolver++2m", "heun", "dpmsolver2m"):
        a = SOLVERS[name].replace(coordinates="native")
        edm_plan = a.plan(schedule, "karras", 12, edm(data_std))
        found = edm_plan.run(network, x)
        expected = a.plan(VarianceExploding(), "karras", 12, "sample").run(plain, x)
        assert float((found - expected).abs().max()) < 1e-9
        assert edm_plan.initial_scale == 80.0
    with pytest.raises(ValueError, match="needs a variance exploding schedule"):
        Solver().plan(SD, "karras", 5, "edm")


def test_hold_is_stepping_with_a_constant_output(analytic) -> None:
    for name in ("ddim", "dpmsolver++3m", "unipc3", "dpmsolver++3s", "heun", "sde-dpmsolver++2m"):
        plan = SOLVERS[name].plan(SD, "karras", 9)
        generator = torch.Generator().manual_seed(5)
        state = torch.randn(plan.registers, 7, dtype=torch.float64, generator=generator)
        u = torch.randn(7, dtype=torch.float64, generator=generator)
        noise = torch.randn(3, plan.noise_columns, 7, dtype=torch.float64, generator=generator)
        held = torch.tensor(plan.hold(4, 7).matrices[0])
        together = held @ torch.cat([state, u[None], noise.flatten(0, 1)])
        for i, k in enumerate((4, 5, 6)):
            step = torch.tensor(plan.matrices[k])
            state = step @ torch.cat([state, u[None], noise[i]])
        assert float((together - state).abs().max()) < 1e-12


def test_hold_of_ddim_is_the_ddim_jump() -> None:
    grid = TimeUniform(final="sigma_min")
    plan = SOLVERS["ddim"].plan(SD, grid, 12)
    times = grid.times(SD, 12)
    for first, last in ((0, 4), (3, 9), (8, 12)):
        final = float(times[last])
        jump = SOLVERS["ddim"].plan(SD, TimeUniform(start=float(times[first]), final=final), 1)
        np.testing.assert_allclose(plan.hold(first, last).matrices, jump.matrices, rtol=1e-12)


def test_inverse_round_trip(analytic) -> None:
    """Data to noise and back; the inverse starts from the clean end of a fine grid."""
    x = 0.3 + 0.2 * analytic.start()
    model = analytic.GAUSSIAN.model(SD)
    for name, steps in (("dpmsolver++2m", 60), ("dpmsolver2m", 60), ("dpmsolver++2s", 120)):
        grid = LogSNR(final="sigma_min")
        there = SOLVERS[name].replace(inverse=True).plan(SD, grid, steps)
        assert (np.diff(there.log_snr) < 0).all()
        noise = there.run(model, x)
        exact = analytic.GAUSSIAN.transport(x, SD, 0.001, 1.0)
        assert float((noise - exact).abs().max()) < 5e-3
        back = SOLVERS[name].plan(SD, grid, steps).run(model, noise)
        assert float((back - x).abs().max()) < 5e-3
    flow = FlowMatching()
    plan = Solver(inverse=True).plan(flow, TimeUniform(final=0.02), 10, "flow_prediction")
    assert plan.timesteps[-1] < 1000 and np.isfinite(plan.matrices).all()


def test_denoise_to_zero_spends_the_last_call_on_the_data_prediction(analytic) -> None:
    x, model = analytic.start(), analytic.MIXTURE.model(SD)
    for name in ("dpmsolver++2m", "dpmsolver2m", "dpmsolver++2s", "unipc2"):
        grid = Karras(final="sigma_min")
        plan = SOLVERS[name].replace(denoise_to_zero=True).plan(SD, grid, 9)
        assert len(plan) == 9
        latents = []
        last = plan.run(model, x, callback=lambda k, y, latents=latents: latents.append(y))
        if name != "unipc2":  # whose last call corrects the latent first
            before = latents[-2]
            x0 = analytic.MIXTURE.data(before, float(SD.alpha(0.001)), float(SD.sigma(0.001)))
            assert float((last - x0).abs().max()) < 1e-10
        plain = SOLVERS[name].plan(SD, Karras(), 9).run(model, x)
        assert float((last - plain).abs().max()) < 1e-9


@pytest.mark.parametrize("order", [2, 3])
def test_embedded_error_is_the_difference_to_the_order_below(analytic, order: int) -> None:
    """With data predictions as columns, ``errors`` is ``B(order) - B(order - 1)`` of one step."""
    grid = TimeUniform(final=0.1)
    sigma = SD.sigma(grid.times(SD, 6))
    plans = [
        Solver(order=o, lower_order_final=False).plan(SD, grid, 6, "sample")
        for o in (order, order - 1)
    ]
    weights = []
    for plan in plans:
        latents = np.array(analytic.unroll(plan)[0])
        weights.append(latents[1:] - (sigma[1:] / sigma[:-1])[:, None] * latents[:-1])
    state = np.zeros((plans[0].registers, 7))
    state[0, 0] = 1.0
    for k in range(6):
        known = np.concatenate([state, np.eye(7)[k + 1][None]])
        expected = weights[0][k] - weights[1][k] if k >= order - 1 else None
        if expected is not None:
            np.testing.assert_allclose(plans[0].errors[k] @ known, expected, atol=1e-12)
            assert np.abs(expected).max() > 1e-3
        state = plans[0].matrices[k] @ known


def test_embedded_error_of_singlestep_and_unipc(analytic) -> None:
    """2S minus DDIM over the whole step; and what UniPC's corrector changed."""
    grid, x, model = TimeUniform(final=0.1), analytic.start(), analytic.MIXTURE.model(SD)
    two_s = Solver(method="singlestep").plan(SD, grid, 2)
    first = grid.times(SD, 2)[[0, 2]]
    ddim = Solver(order=1).plan(SD, TimeUniform(start=first[0], final=first[1]), 1)
    state = [x]
    for k in range(2):
        u = model(state[0], float(two_s.timesteps[k]))
        known = torch.stack([*state, *[x * 0] * (two_s.registers - len(state)), u])
        error = torch.tensordot(torch.tensor(two_s.errors[k]), known, 1)
        state = list(torch.tensordot(torch.tensor(two_s.matrices[k]), known, 1))
    assert float((error - (state[0] - ddim.run(model, x))).abs().max()) < 1e-12
    unipc = Solver(algorithm="unipc").plan(SD, grid, 6)
    plain = Solver(algorithm="unipc", corrector=False).plan(SD, grid, 6)
    assert plain.errors is None or not (plain.errors != 0).any()
    assert (unipc.errors != 0).any(axis=1).tolist() == [False] + [True] * 5


def test_thresholding_acts_on_the_data_prediction(analytic) -> None:
    """Against a loop written out, for both parameterisations; DDIM so that they coincide."""
    threshold = DynamicThreshold(ratio=0.8, minimum=0.1, maximum=0.6)
    x = analytic.start()
    grid = TimeUniform(final=0.02)
    model = analytic.MIXTURE.model(SD)
    times = grid.times(SD, 7).tolist()
    y = x
    for s, t in pairwise(times):
        alpha, sigma = float(SD.alpha(s)), float(SD.sigma(s))
        x0 = threshold((y - sigma * model(y, s * 1000 - 1)) / alpha)
        eps = (y - alpha * x0) / sigma
        y = float(SD.alpha(t)) * x0 + float(SD.sigma(t)) * eps
    for algorithm in ("dpmsolver++", "dpmsolver"):
        plan = Solver(algorithm=algorithm, order=1).plan(SD, grid, 7, threshold=threshold)
        assert float((plan.run(model, x) - y).abs().max()) < 1e-11
        euler = Solver(algorithm=algorithm, order=1, coordinates="ve")
        plan = euler.plan(SD, grid, 7, threshold=threshold)
        found = plan.run(model, x / float(SD.alpha(1.0))) * float(SD.alpha(times[-1]))
        assert float((found - y).abs().max()) < 1e-11


@pytest.mark.parametrize(
    "name", ["dpmsolver++3m", "dpmsolver2m", "unipc2", "dpmsolver++2s", "heun", "ipndm"]
)
def test_thresholding_in_every_family(analytic, name: str) -> None:
    """A quantile below ``minimum`` only divides by it: the same as a model of ``x0 / 50``."""
    grid, x, network = TimeUniform(final=0.02), analytic.start(), analytic.MIXTURE.model(SD)
    threshold = DynamicThreshold(ratio=1.0, minimum=50.0)
    plan = SOLVERS[name].plan(SD, grid, 8, threshold=threshold)
    scaled = SOLVERS[name].plan(SD, grid, 8, "sample")

    def shrunk(y: torch.Tensor, t: float) -> torch.Tensor:
        alpha, sigma = (float(f((t + 1) / 1000)) for f in (SD.alpha, SD.sigma))
        return (y - sigma * network(y, t)) / alpha / 50.0

    start = x * plan.initial_scale
    assert float((plan.run(network, start) - scaled.run(shrunk, start)).abs().max()) < 1e-10
