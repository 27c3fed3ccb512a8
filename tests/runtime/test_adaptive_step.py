"""DPM-Solver-12 and -23: accuracy against tolerance, counts, caps, rows on their own."""

from __future__ import annotations

import pytest
import torch

from sidestep.runtime.schedules import DiscreteVP, FlowMatching, LinearVP
from sidestep.runtime.solvers.adaptive_step import AdaptiveStep
from sidestep.runtime.thresholding import DynamicThreshold

SCHEDULE = LinearVP()


class Counted:
    def __init__(self, model) -> None:
        self.model, self.rows = model, []

    def __call__(self, x, t):
        self.rows.append(x.shape[0])
        return self.model(x, t)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
def test_error_follows_the_tolerance(analytic, algorithm: str, order: int) -> None:
    x = analytic.start(11)
    exact = analytic.MIXTURE.transport(x, SCHEDULE, 1.0, 1e-3)
    errors, calls = [], []
    for tolerance in (3e-2, 3e-3, 3e-4):
        settings = AdaptiveStep(
            algorithm=algorithm, order=order, rtol=tolerance, atol=tolerance / 10
        )
        result = settings.run(analytic.MIXTURE.model(SCHEDULE), x, SCHEDULE)
        errors.append(float((result.x - exact).abs().max()))
        calls.append(result.calls[0])
        assert not result.capped
    assert errors[0] < 0.15 and errors[1] < 0.03 and errors[2] < 3e-3
    assert errors[0] > errors[2] and calls[0] < calls[1] < calls[2]


def test_third_order_needs_fewer_calls(analytic) -> None:
    model, x = analytic.MIXTURE.model(SCHEDULE), analytic.start(11)
    calls = [
        AdaptiveStep(order=order, rtol=1e-3, atol=1e-4).run(model, x, SCHEDULE).calls[0]
        for order in (2, 3)
    ]
    assert calls[1] < 0.8 * calls[0]


def test_calls_are_counted_and_refusals_cost_one_less(analytic) -> None:
    model = Counted(analytic.MIXTURE.model(SCHEDULE))
    x = analytic.start(3).T.contiguous()
    result = AdaptiveStep().run(model, x, SCHEDULE)
    assert result.calls == (len(model.rows),) * 3
    accepted = len(result.times[0]) - 1
    assert result.calls[0] == 3 * accepted + 2 * result.refused[0]
    assert result.times[0][0] == 1.0 and result.times[0][-1] == 1e-3
    assert list(result.times[0]) == sorted(set(result.times[0]), reverse=True)


def test_rows_with_steps_of_their_own_equal_rows_alone(analytic) -> None:
    model, x = analytic.MIXTURE.model(SCHEDULE), analytic.start(4).T.contiguous()
    settings = AdaptiveStep(per_sample=True)
    together = settings.run(model, x, SCHEDULE)
    for i in range(4):
        alone = settings.run(model, x[i : i + 1], SCHEDULE)
        assert torch.equal(alone.x, together.x[i : i + 1])
        assert alone.calls[0] == together.calls[i]
    assert len(set(together.calls)) > 1


def test_the_cap_ends_at_the_end(analytic) -> None:
    model, x = analytic.MIXTURE.model(SCHEDULE), analytic.start(5)
    result = AdaptiveStep(rtol=1e-6, atol=1e-7, max_calls=30).run(model, x, SCHEDULE)
    assert result.capped and result.calls[0] <= 30 + 3
    assert result.times[0][-1] == 1e-3


def test_denoise_to_zero_is_one_more_call(analytic) -> None:
    model, x = analytic.MIXTURE.model(SCHEDULE), analytic.start(5)
    for algorithm in ("dpmsolver", "dpmsolver++"):
        plain = AdaptiveStep(algorithm=algorithm).run(model, x, SCHEDULE)
        clean = AdaptiveStep(algorithm=algorithm, denoise_to_zero=True).run(model, x, SCHEDULE)
        assert clean.calls[0] == plain.calls[0] + 1
        x0 = analytic.MIXTURE.data(
            plain.x, float(SCHEDULE.alpha(1e-3)), float(SCHEDULE.sigma(1e-3))
        )
        assert float((clean.x - x0).abs().max()) < 1e-12


def test_thresholding_and_other_schedules(analytic) -> None:
    x = analytic.start(5)
    flow = FlowMatching()
    result = AdaptiveStep(rtol=1e-3, atol=1e-4).run(
        analytic.MIXTURE.model(flow, "flow_prediction"), x, flow, "flow_prediction"
    )
    exact = analytic.MIXTURE.transport(x, flow, 0.999, 1e-3)
    assert float((result.x - exact).abs().max()) < 0.02
    schedule = DiscreteVP.scaled_linear()
    clipped = AdaptiveStep(algorithm="dpmsolver++", denoise_to_zero=True).run(
        analytic.MIXTURE.model(schedule), x, schedule,
        threshold=DynamicThreshold(ratio=1.0, minimum=0.3, maximum=0.3),
    )  # fmt: skip
    assert float(clipped.x.abs().max()) <= 1.0 + 1e-12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": 1}, "order is 1, expected 2 or 3"),
        ({"algorithm": "unipc"}, "algorithm is 'unipc'"),
        ({"atol": 0.0}, "atol is 0.0"),
        ({"rtol": -1.0}, "rtol is -1.0"),
        ({"max_calls": 0}, "max_calls is 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveStep(**settings)


def test_bad_times_are_refused(analytic) -> None:
    x = analytic.start(3)
    with pytest.raises(ValueError, match=r"goes from time 0\.1 to 0\.5"):
        AdaptiveStep().run(analytic.MIXTURE.model(SCHEDULE), x, SCHEDULE, start=0.1, end=0.5)
