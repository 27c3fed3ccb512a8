"""Error control: its numbers by a transcription, its weights by integration."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criteria.carried_error import carried_error
from sidestep.runtime.methods.criteria.error_control import ErrorControl
from sidestep.runtime.methods.criterion import Course, Observation
from sidestep.runtime.methods.reuse import straightness

STEPS, ROWS, SIZE = 24, 3, 50
LOG_SNR = np.linspace(-2.5, 2.5, STEPS)


def outputs(seed: int = 0) -> torch.Tensor:  # [STEPS, ROWS, SIZE]
    """Paths of a line plus a random walk; some rows are calmer than others."""
    draw = torch.Generator().manual_seed(seed)
    walk = torch.randn(STEPS, ROWS, SIZE, generator=draw).cumsum(0)
    calm = torch.tensor([0.02, 0.05, 0.2])[:, None]
    return torch.randn(ROWS, SIZE, generator=draw) + calm * walk


def decide(
    u: torch.Tensor, threshold: float, multistep: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Which steps each row computes and the numbers compared, ``[STEPS, ROWS]`` each."""
    criterion = Adaptive(mode="error-control", threshold=threshold, warm_up=2).criterion()
    criterion.start(
        Course(
            rows=u.shape[1],
            steps=STEPS,
            log_snr=LOG_SNR.tolist(),
            prediction="epsilon",
            multistep=multistep,
        )
    )
    computed = np.ones((STEPS, u.shape[1]), bool)
    values = np.full((STEPS, u.shape[1]), math.nan)
    x = torch.zeros_like(u[0])
    for k in range(STEPS - 1):
        seen = Observation(
            step=k, x=x, x_next=x, output=u[k].clone(), computed=computed[k].tolist()
        )
        decision = criterion.observe(seen)
        computed[k + 1] = decision.compute
        if decision.value is not None:
            values[k + 1] = decision.value.numpy()
    return computed, values


def transcription(
    u: np.ndarray, threshold: float, multistep: bool
) -> tuple[list[bool], list[float]]:
    """One row in float64, as the module's docstring has it; u is ``[STEPS, SIZE]``."""
    rms = lambda v: math.sqrt((v**2).mean())  # noqa: E731
    errors, fresh, debt, share = [], [0], 0.0, 0.5
    called, values = [True], [math.nan]
    for k in range(1, STEPS):
        if fresh[-1] == k - 1:
            debt = 0.0
        if k >= 2:
            b = fresh[-1]
            e = math.sqrt(np.mean(errors[-2:]))
            now, after = LOG_SNR[k], LOG_SNR[k + 1] if k + 1 < STEPS else math.inf
            alpha, clean = 1 / math.hypot(1, math.exp(-now)), 1 / math.hypot(1, math.exp(-after))
            g = clean * (1 - math.exp(now - after)) * math.exp(-now)
            S = 0.25 / math.hypot(0.25, math.exp(-now)) / alpha
            S *= (STEPS / 50) ** 0.75 * (1.6 if now > 0.4 else 1)
            debt += S * g * rms(u[b]) * math.sqrt(e * 0.05) * (k - b) ** 0.8
            free = k < STEPS - 2 and k - b <= b - fresh[-2]
            skip = free and debt <= threshold
        else:
            free = skip = False
        called.append(not skip)
        values.append(debt if free else math.nan)
        if not skip:
            b = fresh[-1]
            guess = u[b]
            if len(fresh) > 1:
                a = fresh[-2]
                line = (LOG_SNR[k] - LOG_SNR[b]) / (LOG_SNR[b] - LOG_SNR[a]) * (u[b] - u[a])
                straight = 0 if multistep else 1 / (1 + ((LOG_SNR[k] - LOG_SNR[a]) / 0.7) ** 8)
                guess = u[b] + max(share, straight) * line
                share = min(1, max(0, (u[k] - u[b]) @ line / (line @ line)))
            errors.append((rms(u[k] - guess) / (rms(u[k]) * (k - b) ** 0.8)) ** 2)
            fresh.append(k)
    return called, values


@pytest.mark.parametrize("multistep", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.003, 0.01, 0.03, 0.1])
def test_decisions_and_numbers_equal_the_transcription(threshold: float, multistep: bool) -> None:
    u = outputs()
    computed, values = decide(u, threshold, multistep)
    for row in range(ROWS):
        expected, numbers = transcription(u[:, row].double().numpy(), threshold, multistep)
        assert computed[:, row].tolist() == expected
        free = ~np.isnan(numbers)
        np.testing.assert_allclose(values[free, row], np.array(numbers)[free], rtol=1e-4)
        assert free.sum() >= STEPS - 9


def test_the_test_is_not_trivial() -> None:
    calls = decide(outputs(), 0.003)[0].sum(0)
    assert 9 < calls.min() and calls.max() < STEPS
    assert (np.diff(calls) > 0).all()  # restless rows call more


def test_a_run_grows_by_one_step_at_most() -> None:
    computed, _ = decide(outputs(), 1e9)
    assert np.flatnonzero(computed[:, 0]).tolist() == [0, 1, 3, 6, 10, 15, 21, 22, 23]


def test_more_error_allowed_means_fewer_calls() -> None:
    calls = [decide(outputs(), t)[0].sum() for t in (0.0, 0.003, 0.01, 0.03, 0.1, 1e9)]
    assert calls[0] == STEPS * ROWS and calls[-1] == 9 * ROWS
    assert calls == sorted(calls, reverse=True)


def test_a_row_decides_for_itself() -> None:
    u = outputs()
    together, values = decide(u, 0.01)
    for row in range(ROWS):
        alone, numbers = decide(u[:, row : row + 1], 0.01)
        assert np.array_equal(alone[:, 0], together[:, row])
        free = ~np.isnan(numbers[:, 0])
        np.testing.assert_array_equal(numbers[free, 0], values[free, row])
        assert free.sum() >= STEPS - 9


def test_not_a_number_computes() -> None:
    u = outputs()
    u[6:, 1] = math.nan
    computed, _ = decide(u, 1e9)
    assert computed[:, 0].sum() == computed[:, 2].sum() == 9
    u = outputs()
    u[1, 1] = math.nan  # the first error is unknown, and stays so until two others are there
    assert decide(u, 0.01)[0][2:4, 1].all()


def test_reused_outputs_are_not_measured() -> None:
    """What a row is given on skipped steps does not enter its estimate."""
    u = outputs()
    computed, values = decide(u, 0.01)
    changed = torch.where(torch.from_numpy(computed)[:, :, None], u, torch.full_like(u, 7.0))
    again, numbers = decide(changed, 0.01)
    assert np.array_equal(again, computed)
    np.testing.assert_array_equal(numbers, values)


# -- S_k and g_k ------------------------------------------------------------------------------


def gaussian_flow(log_snr: float, s: float = 0.25) -> float:
    """d x_end / d x of the flow of N(0, s^2), integrated, where alpha^2 + sigma^2 = 1."""
    sigma = math.exp(-log_snr)  # of x / alpha, whose flow is dx/dsigma = sigma x / (s^2 + sigma^2)
    grid = np.linspace(0, sigma, 20001)
    middle = (grid[1:] + grid[:-1]) / 2
    total = np.sum(middle / (s**2 + middle**2)) * (grid[1] - grid[0])
    return math.exp(-total) * math.hypot(1, sigma)


@pytest.mark.parametrize(
    "prediction, slope",
    [
        ("epsilon", lambda a, s: s / a),
        ("sample", lambda a, s: 1.0),
        ("v_prediction", lambda a, s: s),
        ("flow_prediction", lambda a, s: s / (a + s)),
    ],
)
def test_carried_error(prediction: str, slope) -> None:
    carried = carried_error(
        Course(rows=1, steps=STEPS, log_snr=LOG_SNR.tolist(), prediction=prediction)
    )
    assert len(carried) == STEPS
    for k in (0, 7, 15, STEPS - 2):
        noise, after = math.exp(-LOG_SNR[k]), math.exp(-LOG_SNR[k + 1])
        a, s = 1 / math.hypot(1, noise), noise / math.hypot(1, noise)
        # dx/dsigma = (x - x0) / sigma in x / alpha, with x0 off by one slope: the exact solution
        share = (STEPS / 50) ** 0.75 * (1.6 if LOG_SNR[k] > 0.4 else 1)
        moved = slope(a, s) * (1 - after / noise) / math.hypot(1, after)
        assert carried[k] == pytest.approx(share * moved * gaussian_flow(LOG_SNR[k]), rel=1e-4)
    noise = math.exp(-LOG_SNR[-1])
    last = slope(1 / math.hypot(1, noise), noise / math.hypot(1, noise))
    assert carried[-1] == pytest.approx(
        1.6 * (STEPS / 50) ** 0.75 * last * gaussian_flow(LOG_SNR[-1])
    )


def test_carried_error_at_the_ends_and_without_knowledge() -> None:
    assert carried_error(Course(rows=1, steps=25)) == [0.5**0.75 / 25] * 25
    assert carried_error(Course(rows=1)) == [1 / 50] * 50
    flow = carried_error(
        Course(rows=1, steps=3, log_snr=(-math.inf, 0.0, math.inf), prediction="flow_prediction")
    )
    assert all(math.isfinite(v) for v in flow) and flow[2] == 0.0
    unknown = carried_error(Course(rows=1, steps=STEPS, log_snr=LOG_SNR.tolist()))
    epsilon = Course(rows=1, steps=STEPS, log_snr=LOG_SNR.tolist(), prediction="epsilon")
    assert unknown == carried_error(epsilon)


def skipped_weights(u: torch.Tensor, multistep: bool) -> tuple[float, ...]:
    """Those of step 3, after three computed steps."""
    criterion = Adaptive(mode="error-control", threshold=1e9, warm_up=3).criterion()
    course = Course(rows=1, steps=STEPS, log_snr=LOG_SNR.tolist(), multistep=multistep)
    criterion.start(course)
    for k in range(3):
        seen = Observation(step=k, x=u[k], x_next=u[k], output=u[k], computed=[True])
        decision = criterion.observe(seen)
    assert decision.weights is not None
    return tuple(decision.weights[0])


def test_weights_follow_the_share_of_the_last_change_that_came_true() -> None:
    direction = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(1))
    for share in (0.0, 0.25, 1.0):
        u = torch.stack([0 * direction, direction, (1 + share) * direction])
        assert skipped_weights(u, multistep=True) == pytest.approx((1 + share, -share), abs=1e-6)
    back = torch.stack([0 * direction, direction, 0.5 * direction])
    assert skipped_weights(back, multistep=True) == pytest.approx((1.0, 0.0), abs=1e-6)
    on = torch.stack([0 * direction, direction, 3 * direction])
    assert skipped_weights(on, multistep=True) == pytest.approx((2.0, -1.0), abs=1e-6)


def test_a_short_reach_is_straight_but_for_a_multistep_solver() -> None:
    course = Course(rows=1, steps=5, log_snr=(-math.inf, 0.0, 0.2, 0.4, 5.0))
    assert straightness([2, 1], 3, course) == pytest.approx(1 / (1 + (0.4 / 0.7) ** 8))
    assert straightness([3, 2], 4, course) < 1e-6
    assert straightness([1, 0], 2, course) == pytest.approx(0, abs=1e-9)
    assert straightness([2, 1], 3, replace(course, multistep=True)) == 0.0
    assert straightness([2, 1], 3, Course(rows=1, steps=5)) == 0.0
    direction = torch.ones(1, SIZE)
    stalled = torch.stack([0 * direction, direction, direction])
    straight = straightness([2, 1], 3, Course(log_snr=LOG_SNR.tolist()))
    assert 0.9 < straight and skipped_weights(stalled, multistep=False) == pytest.approx(
        (1 + straight, -straight)
    )
    assert isinstance(Adaptive(mode="error-control").criterion(), ErrorControl)
