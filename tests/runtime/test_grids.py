"""Grids: definitions, ends, and the same points as diffusers where the conventions coincide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from sidestep.runtime.grids import (
    GRIDS,
    Beta,
    Custom,
    Karras,
    Leading,
    LogSNR,
    TimeUniform,
    Trailing,
    find_grid,
)
from sidestep.runtime.schedules import (
    DiscreteVP,
    FlowMatching,
    LinearVP,
    Schedule,
    VarianceExploding,
)
from sidestep.runtime.solvers import SOLVERS

SCHEDULES: dict[str, Schedule] = {
    "discrete": DiscreteVP.scaled_linear(),
    "zero_snr": DiscreteVP.scaled_linear(rescale_zero_snr=True),
    "continuous": LinearVP(),
    "ve": VarianceExploding(),
    "flow": FlowMatching(shift=3.0),
}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("final", ["zero", "sigma_min", 0.01])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_grid_runs_from_end_to_end(schedule: str, name: str, final: str | float) -> None:
    grid, where = replace(GRIDS[name], final=final), SCHEDULES[schedule]
    if name == "leading" and where.train_steps is None:
        with pytest.raises(ValueError, match="expected one of N timesteps"):
            grid.times(where, 4)
        return
    if name == "flow-shift" and schedule == "ve":
        with pytest.raises(ValueError, match="shift needs times in"):
            grid.times(where, 4)
        return
    for steps in (2, 3, 10):
        times = grid.times(where, steps)
        assert len(times) == steps + 1
        assert times[-1] == {"zero": 0.0, "sigma_min": where.finite[0]}.get(final, final)
        if name != "leading":
            assert times[0] == where.t_max
            assert (np.diff(times) < 0).all()
    assert grid.times(where, 1)[-1] == grid.end(where)


def test_spacings_are_even_in_what_they_say() -> None:
    schedule = SCHEDULES["discrete"]
    even = {
        "linspace": lambda t: t,
        "quadratic": np.sqrt,
        "logsnr": schedule.log_snr,
        "karras": lambda t: schedule.noise_level(t) ** (1 / 7),
    }
    for name, quantity in even.items():
        times = replace(GRIDS[name], final="sigma_min").times(schedule, 9)
        gaps = np.diff(quantity(times))
        np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9, err_msg=name)
    gaps = np.diff(GRIDS["trailing"].times(schedule, 9))
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)


def test_beta_grid_is_at_the_quantiles() -> None:
    from scipy.stats import beta

    times = Beta(final=0.1).times(LinearVP(), 8)
    level = beta.cdf((times - 0.1) / 0.9, 0.6, 0.6)
    np.testing.assert_allclose(level, np.linspace(1, 0, 9), atol=1e-12)


def test_flow_grids_are_the_published_ones() -> None:
    sigma = FlowMatching().sigma(TimeUniform().times(FlowMatching(), 4))
    np.testing.assert_allclose(sigma, [1.0, 0.75, 0.5, 0.25, 0.0])
    shifted = FlowMatching(shift=3.0)
    sigma = shifted.sigma(TimeUniform().times(shifted, 4))
    np.testing.assert_allclose(sigma, [1.0, 0.9, 0.75, 0.5, 0.0])
    same = FlowMatching().sigma(TimeUniform(shift=3.0).times(FlowMatching(), 4))
    np.testing.assert_allclose(same, sigma)


@pytest.mark.parametrize("steps", [5, 10, 23])
@pytest.mark.parametrize(
    ("scheduler", "settings", "grid"),
    [
        (DPMSolverMultistepScheduler, {}, TimeUniform(integer=True)),
        (
            DPMSolverMultistepScheduler,
            {"timestep_spacing": "leading", "steps_offset": 1},
            Leading(integer=True, endpoint=False, offset=1),
        ),
        (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}, Trailing(integer=True)),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, Karras()),
        (DPMSolverMultistepScheduler, {"use_exponential_sigmas": True}, LogSNR()),
        (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}, LogSNR()),
        (DPMSolverMultistepScheduler, {"use_beta_sigmas": True}, Beta(of="sigma")),
        (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, Trailing(integer=True)),
        (
            EulerDiscreteScheduler,
            {"timestep_spacing": "leading", "steps_offset": 1},
            Leading(integer=True, offset=1),
        ),
        (EulerDiscreteScheduler, {}, TimeUniform(endpoint=True)),
    ],
)
def test_sigmas_are_those_of_diffusers(scheduler, settings, grid, steps: int) -> None:
    theirs = scheduler(**SD, **settings)
    theirs.set_timesteps(steps)
    euler = scheduler is EulerDiscreteScheduler
    schedule = DiscreteVP(
        alphas_cumprod=theirs.alphas_cumprod.double().numpy(),
        interpolation="sigma" if euler else "log_snr",
    )
    sigmas = schedule.noise_level(grid.times(schedule, steps))
    np.testing.assert_allclose(sigmas, theirs.sigmas.numpy(), rtol=2e-5)


def test_custom_sigmas_and_timesteps() -> None:
    schedule = SCHEDULES["discrete"]
    for grid in (Custom(sigmas=(10.0, 3.0, 0.5)), Custom(sigmas=(10.0, 3.0, 0.5, 0.0))):
        times = grid.times(schedule, 3)
        np.testing.assert_allclose(schedule.noise_level(times), [10.0, 3.0, 0.5, 0.0], rtol=1e-12)
    times = Custom(timesteps=(999, 500, 20), final="sigma_min").times(schedule)
    np.testing.assert_allclose(times, [1.0, 0.501, 0.021, 0.001])
    flow = SCHEDULES["flow"]
    times = Custom(timesteps=(1000.0, 600.0)).times(flow)
    np.testing.assert_allclose(flow.sigma(times), [1.0, 0.6, 0.0])
    with pytest.raises(ValueError, match="expected the 3 of the grid"):
        Custom(sigmas=(10.0, 3.0, 0.5)).times(schedule, 5)
    with pytest.raises(ValueError, match="either sigmas or timesteps"):
        Custom()
    with pytest.raises(ValueError, match="expected sigmas"):
        Custom(timesteps=(3.0,)).times(LinearVP())


def test_a_repeated_point_is_not_called_twice() -> None:
    schedule = SCHEDULES["discrete"]
    plan = SOLVERS["ddim"].plan(schedule, Leading(final="sigma_min"), 10)
    assert len(plan) == 9  # the tenth call would be at sigma_min, where the grid ends
    plan = SOLVERS["dpmsolver++2m"].plan(schedule, Custom(sigmas=(9.0, 2.0, 2.0, 0.1)))
    assert len(plan) == 3
    plan = SOLVERS["dpmsolver++2m"].plan(schedule, Custom(sigmas=(9.0, 2.0, 2.0 - 1e-12, 0.1)))
    assert len(plan) == 3
    with pytest.raises(ValueError, match="turns back"):
        SOLVERS["ddim"].plan(schedule, Custom(sigmas=(2.0, 9.0, 0.1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimeUniform(final="end"), "final is 'end'"),
        (lambda: Beta(of="x"), "of is 'x'"),
        (lambda: TimeUniform().times(LinearVP(), 0), "steps is 0"),
        (lambda: TimeUniform(start=0.5, final=0.7).times(LinearVP(), 3), "start > end"),
        (lambda: TimeUniform(integer=True).times(LinearVP(), 3), "integer needs a discrete"),
        (lambda: Leading(offset=300).times(SCHEDULES["discrete"], 4), "offset 300"),
        (lambda: find_grid("nope"), "grid 'nope' is unknown, expected one of linspace"),
    ],
)
def test_bad_grids_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
