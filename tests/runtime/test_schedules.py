"""Schedules: identities, inverses, both ends, and published or independent values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sidestep.runtime.schedules import (
    CosineVP,
    DiscreteVP,
    FlowMatching,
    LinearVP,
    Schedule,
    VarianceExploding,
)

SCHEDULES: dict[str, Schedule] = {
    "linear": DiscreteVP.linear(),
    "scaled_linear": DiscreteVP.scaled_linear(),
    "squaredcos": DiscreteVP.squaredcos(),
    "zero_snr": DiscreteVP.scaled_linear(rescale_zero_snr=True),
    "log_snr": DiscreteVP.scaled_linear(interpolation="log_snr"),
    "sigma": DiscreteVP.scaled_linear(interpolation="sigma"),
    "continuous": LinearVP(),
    "cosine": CosineVP(),
    "cosine_full": CosineVP(t_max=1.0),
    "ve": VarianceExploding(),
    "flow": FlowMatching(),
    "flow_shifted": FlowMatching(shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_definitions_and_inverses(name: str) -> None:
    schedule = SCHEDULES[name]
    t = np.linspace(0.0, schedule.t_max, 777)
    alpha, sigma, log_snr = schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t)
    assert (np.diff(log_snr) < 0).all()
    inside = np.isfinite(log_snr)
    assert inside.sum() >= 775
    np.testing.assert_allclose(np.exp(log_snr[inside]) * sigma[inside], alpha[inside], rtol=1e-11)
    np.testing.assert_allclose(schedule.t_from_log_snr(log_snr), t, atol=1e-12 * schedule.t_max)
    level = schedule.noise_level(t)
    np.testing.assert_allclose(schedule.t_from_noise_level(level), t, atol=1e-12 * schedule.t_max)
    if name.startswith("flow"):
        np.testing.assert_allclose(alpha + sigma, 1.0, rtol=1e-15)
    elif name == "ve":
        assert (alpha == 1).all() and (sigma == t).all()
    else:
        np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-14)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_clean_end_is_exact(name: str) -> None:
    schedule = SCHEDULES[name]
    assert float(schedule.alpha(0.0)) == 1.0
    assert float(schedule.sigma(0.0)) == 0.0
    assert float(schedule.log_snr(0.0)) == math.inf


@pytest.mark.parametrize("name", ["zero_snr", "cosine_full", "flow", "flow_shifted"])
def test_the_end_without_signal_is_exact(name: str) -> None:
    schedule = SCHEDULES[name]
    assert float(schedule.alpha(1.0)) == 0.0
    assert float(schedule.sigma(1.0)) == 1.0
    assert float(schedule.log_snr(1.0)) == -math.inf
    assert schedule.finite[1] < 1.0
    assert np.isfinite(schedule.log_snr(schedule.finite[1]))


def test_discrete_tables_are_the_training_tables() -> None:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    table = np.cumprod(1 - betas)
    schedule = DiscreteVP.scaled_linear()
    for n in (0, 1, 500, 999):
        t = (n + 1) / 1000
        assert float(schedule.alpha(t)) == pytest.approx(math.sqrt(table[n]), rel=1e-14)
        assert schedule.model_time(t) == n
    # Stable Diffusion's sigmas, as k-diffusion users know them.
    assert float(schedule.noise_level(1.0)) == pytest.approx(14.6146, abs=1e-3)
    assert float(schedule.noise_level(0.001)) == pytest.approx(0.0292, abs=1e-4)


def test_interpolation_between_timesteps() -> None:
    halfway = (500 + 501) / 2 / 1000
    ends = [500 / 1000, 501 / 1000]
    for name, quantity in [
        ("scaled_linear", lambda s, t: np.log(s.alpha(t))),
        ("log_snr", lambda s, t: s.log_snr(t)),
        ("sigma", lambda s, t: s.noise_level(t)),
    ]:
        schedule = SCHEDULES[name]
        assert quantity(schedule, halfway) == pytest.approx(
            np.mean([quantity(schedule, t) for t in ends]), rel=1e-12
        )


def test_zero_snr_rescaling_keeps_the_first_alpha() -> None:
    plain, rescaled = SCHEDULES["scaled_linear"], SCHEDULES["zero_snr"]
    assert float(rescaled.alpha(0.001)) == pytest.approx(float(plain.alpha(0.001)), rel=1e-14)
    halfway = (999 + 1000) / 2 / 1000
    assert float(rescaled.alpha(halfway)) == pytest.approx(float(rescaled.alpha(0.999)) / 2)


def test_continuous_linear_is_the_limit_of_the_discrete_one() -> None:
    fine = DiscreteVP.from_betas(np.linspace(0.1, 20.0, 20000) / 20000)
    t = np.array([0.1, 0.3, 0.7, 1.0])
    np.testing.assert_allclose(fine.log_snr(t), LinearVP().log_snr(t), rtol=0, atol=2e-3)


def test_cosine_is_nichol_and_dhariwal() -> None:
    t = np.array([0.1, 0.5, 0.9])
    expected = np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    np.testing.assert_allclose(CosineVP().alpha(t), expected, rtol=1e-14)
    np.testing.assert_allclose(DiscreteVP.squaredcos().alpha(t), expected, rtol=1e-9)


def test_min_log_snr_starts_later() -> None:
    schedule = DiscreteVP.squaredcos(min_log_snr=-5.1)
    assert float(schedule.log_snr(schedule.t_max)) >= -5.1
    assert float(schedule.log_snr(schedule.t_max + 0.001)) < -5.1
    assert DiscreteVP.squaredcos().t_max == 1.0


def test_model_time_and_starting_scale() -> None:
    assert DiscreteVP.linear(round_timesteps=True).model_time(0.5004) == 499.0
    assert DiscreteVP.linear().model_time(0.5004) == pytest.approx(499.4)
    assert LinearVP(time_scale=999.0).model_time(0.5) == 499.5
    assert VarianceExploding().model_time(2.0) == 2.0
    assert VarianceExploding(conditioning="edm").model_time(2.0) == pytest.approx(math.log(2.0) / 4)
    assert FlowMatching(shift=3.0).model_time(0.5) == pytest.approx(750.0)
    assert VarianceExploding().initial_scale(80.0) == 80.0
    assert FlowMatching().initial_scale(1.0) == 1.0
    assert LinearVP().initial_scale(1.0) == 1.0


def test_from_config_reads_what_diffusers_writes() -> None:
    from diffusers import DDIMScheduler

    for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        for zero in (False, True):
            theirs = DDIMScheduler(
                beta_schedule=name, beta_start=0.001, beta_end=0.012, rescale_betas_zero_snr=zero
            )
            ours = DiscreteVP.from_config(theirs.config)
            np.testing.assert_allclose(
                ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-5, atol=2e-9
            )
    betas = [0.1, 0.2, 0.3]
    trained = DiscreteVP.from_config({"trained_betas": betas})
    np.testing.assert_allclose(trained.alphas_cumprod, [0.9, 0.72, 0.504])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscreteVP(alphas_cumprod=np.array([0.5, 0.6])), "falling"),
        (lambda: DiscreteVP(alphas_cumprod=np.array([1.0, 0.5])), r"leaves \[0, 1\)"),
        (lambda: DiscreteVP.linear(interpolation="cubic"), "interpolation is 'cubic'"),
        (
            lambda: DiscreteVP.linear(rescale_zero_snr=True, interpolation="sigma"),
            "zero terminal SNR",
        ),
        (
            lambda: DiscreteVP.from_config({"beta_schedule": "laplace"}),
            "beta_schedule is 'laplace'",
        ),
        (lambda: VarianceExploding(sigma_min=3, sigma_max=2), "sigma_min is 3"),
        (lambda: VarianceExploding(conditioning="x"), "conditioning is 'x'"),
        (lambda: FlowMatching(shift=0), "shift is 0"),
    ],
)
def test_bad_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
