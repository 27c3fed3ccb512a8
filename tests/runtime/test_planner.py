"""The planner's arithmetic, against the closed forms of its model (facts, section 4.3)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sidestep.kernels.core import parareal_cost, simulate_parareal
from sidestep.runtime.latency import Latency, Overhead
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.methods.srds_blocks import block_counts, expected_iterations
from sidestep.runtime.planner import (
    WORTHWHILE,
    choose,
    plan,
    predict,
    settings_of,
    wavefront,
)

T1 = 0.02


def linear(a: float, largest: int = 64) -> Latency:
    """t(b) = t1 (a + (1 - a) b), measured exactly."""
    sizes = [0.5, *(2.0**i for i in range(largest.bit_length()))]
    return Latency(tuple((b, T1 * (a + (1 - a) * b)) for b in sizes))


def equal(steps: int, blocks: int) -> tuple[int, ...]:
    return SRDS(blocks=blocks).bounds(steps)


# -- the latency curve ----------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_the_line_is_found_in_exact_points(a: float) -> None:
    latency = linear(a)
    np.testing.assert_allclose(latency.line, (T1, a), atol=1e-9)
    sizes = np.array([0.25, 0.5, 1, 3, 5.5, 64, 100])
    np.testing.assert_allclose(latency(sizes), T1 * (a + (1 - a) * sizes), rtol=1e-9)
    assert float(latency(0)) == 0.0


def test_measured_points_count_where_there_are_some_and_never_descend() -> None:
    latency = Latency(((1.0, 0.010), (2.0, 0.011), (4.0, 0.009), (8.0, 0.030)))
    np.testing.assert_allclose(latency(np.array([2.0, 3.0, 4.0])), 0.010, rtol=1e-12)
    assert float(latency(6)) == pytest.approx(0.020)
    times = latency(np.linspace(0.1, 20, 200))
    assert (np.diff(times) >= 0).all() and (times >= 0).all()


def test_the_line_is_the_best_of_the_relative_error() -> None:
    points = ((1.0, 1.0), (2.0, 1.7), (4.0, 2.4), (8.0, 5.0))

    def error(t1: float, a: float) -> float:
        return sum((t1 * (a + (1 - a) * b) / s - 1) ** 2 for b, s in points)

    t1, a = Latency(points).line
    for dt in (-1e-3, 0, 1e-3):
        for da in (-1e-3, 0, 1e-3):
            assert error(t1, a) <= error(t1 + dt, a + da) + 1e-15


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (((1.0, 0.1),), "two or more"),
        (((1.0, 0.1), (1.0, 0.2)), "ascend from 0"),
        (((0.0, 0.1), (1.0, 0.2)), "ascend from 0"),
        (((1.0, 0.1), (2.0, -0.2)), "times above 0"),
        (((1.0, 0.1), (2.0, math.nan)), "times above 0"),
    ],
)
def test_points_that_are_no_curve_are_refused(
    points: tuple[tuple[float, float], ...], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        Latency(points)


# -- what a run takes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "blocks"), [(25, 13), (50, 17), (100, 20), (101, 7)])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_ticks_and_evaluations_until_the_stop(steps: int, blocks: int, K: int) -> None:
    bounds = equal(steps, blocks)
    widths, ticks = wavefront(bounds, K)
    everything = simulate_parareal(bounds, blocks)
    assert ticks == everything.formed[K] == simulate_parareal(bounds, K).ticks
    ahead = simulate_parareal(bounds, min(blocks, K + 2))
    np.testing.assert_array_equal(widths, ahead.widths[:ticks])
    assert parareal_cost(bounds, K) < widths.sum() <= everything.widths[:ticks].sum()


@pytest.mark.parametrize("a", [0.0, 0.5, 0.8])
@pytest.mark.parametrize(("steps", "blocks", "K"), [(25, 13, 3), (50, 10, 2), (100, 20, 2)])
def test_one_rank_follows_the_closed_form(a: float, steps: int, blocks: int, K: int) -> None:
    bounds = equal(steps, blocks)
    widths, T = wavefront(bounds, K)
    E = int(widths.sum())
    cost = predict(linear(a), bounds, [K])
    assert (cost.ticks, cost.evaluations) == (T, E)
    S = steps * T1 / cost.seconds
    assert pytest.approx(steps / (a * T + (1 - a) * E), rel=1e-9) == S
    even = (E - steps) / (E - T)  # a at which nothing is gained or lost
    at_even = predict(linear(even), bounds, [K]).seconds
    assert at_even == pytest.approx(steps * T1, rel=1e-9)


def test_ranks_share_every_tick() -> None:
    bounds, K, a = equal(100, 20), 2, 0.5
    widths, T = wavefront(bounds, K)
    for ranks in (2, 4, 8, 64):
        shares = -(-widths // ranks)
        expected = T1 * (a * T + (1 - a) * shares.sum())
        assert predict(linear(a), bounds, [K], ranks=ranks).seconds == pytest.approx(expected)
    assert predict(linear(a), bounds, [K], ranks=64).seconds == pytest.approx(T1 * T)


def test_ranks_that_share_a_machine_are_compared_with_one_alone_on_it() -> None:
    alone, together = linear(0.5), Latency(((1.0, 1.5 * T1), (64.0, 1.5 * float(linear(0.5)(64)))))
    apart = plan(alone, 100, ranks=2, branches=2)
    shared = plan(together, 100, ranks=2, branches=2, alone=alone)
    assert apart.choice.kind == "guidance" and apart.choice.speedup == pytest.approx(4 / 3)
    by_kind = {one.kind: one for one in shared.candidates[::-1]}  # the best of each
    assert by_kind["guidance"].speedup == pytest.approx(4 / 3 / 1.5)
    assert by_kind["serial"].speedup == 1.0 and by_kind["serial"].seconds == pytest.approx(100 * T1)
    assert shared.choice.kind == "serial"
    best = next(one for one in apart.candidates if one.kind == "srds")
    assert by_kind["srds"].speedup == pytest.approx(best.speedup / 1.5)


def test_degenerate_cuts_take_as_many_calls_as_the_plain_loop() -> None:
    for bounds, K in ((equal(12, 12), 3), (equal(12, 4), 4), (equal(12, 1), 1)):
        assert predict(linear(1.0), bounds, [K]).ticks == 12
        assert predict(linear(1.0), bounds, [K]).seconds == pytest.approx(12 * T1)


def test_images_that_are_done_leave() -> None:
    bounds, latency = equal(50, 17), linear(0.4)
    calls, long = wavefront(bounds, 3)
    widths, short = wavefront(bounds, 1)
    cost = predict(latency, bounds, [3, 1, 1])
    calls = calls.astype(float)
    calls[:short] += 2 * widths
    assert cost.ticks == long
    assert cost.evaluations == pytest.approx(calls.sum() / 3)
    assert cost.seconds == pytest.approx(float(latency(calls).sum()))


def test_what_is_beside_the_model_is_added() -> None:
    bounds, latency = equal(25, 13), linear(0.5)
    bare = predict(latency, bounds, [2])
    beside = Overhead(record=1e-3, tick=2e-3, evaluation=1e-4, message=5e-3)
    alone = predict(latency, bounds, [2], overhead=beside)
    own = 25 * 1e-3 + bare.ticks * 2e-3 + bare.evaluations * 1e-4
    assert alone.seconds == pytest.approx(bare.seconds + own)
    widths, T = wavefront(bounds, 2)
    shared = predict(latency, bounds, [2], ranks=2, overhead=beside).seconds
    own = 25 * 1e-3 + T * (2e-3 + 5e-3) + float((-(-widths // 2)).sum()) * 1e-4
    assert shared == pytest.approx(predict(latency, bounds, [2], ranks=2).seconds + own)


def test_a_limit_of_the_width_is_kept() -> None:
    widths, ticks = wavefront(equal(50, 17), 2, 4)
    assert max(widths) <= 4 and ticks > wavefront(equal(50, 17), 2)[1]


# -- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [25, 100])
def test_a_busy_device_is_left_alone(steps: int) -> None:
    decision = plan(linear(0.0), steps)
    assert decision.choice.kind == "serial" and decision.choice.speedup == 1
    assert "nothing is gained by making calls together" in decision.reason
    assert choose(linear(0.0), steps) is None
    best = max(one.speedup for one in decision.candidates if one.kind == "srds")
    assert best < 1


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_gain_grows_with_a(ranks: int) -> None:
    gains = [plan(linear(a), 100, ranks=ranks).candidates[0].speedup for a in np.linspace(0, 1, 9)]
    assert (np.diff(gains) >= -1e-9).all() and gains[-1] > 3


def test_an_idle_device_gets_srds() -> None:
    decision = plan(linear(0.95), 100, iterations=2)
    choice = decision.choice
    assert choice.kind == "srds" and choice.speedup == decision.candidates[0].speedup > 2
    assert choose(linear(0.95), 100, iterations=2) == SRDS(blocks=choice.blocks)
    assert len(SRDS(blocks=choice.blocks).bounds(100)) == choice.blocks + 1
    assert f"{choice.ticks:.0f} calls in a row instead of 100" in decision.reason
    speeds = [one.speedup for one in decision.candidates]
    assert speeds == sorted(speeds, reverse=True)


def test_less_than_a_twentieth_is_not_worth_it() -> None:
    def best(a: float) -> float:
        return max(o.speedup for o in plan(linear(a), 100).candidates if o.kind == "srds")

    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if best(middle) < WORTHWHILE else (low, middle)
    assert plan(linear(low - 1e-4), 100).choice.kind == "serial"
    assert plan(linear(high + 1e-4), 100).choice.kind == "srds"


def test_exact_ways_over_several_ranks_are_preferred_where_they_are_quicker() -> None:
    choice = plan(linear(0.0), 50, ranks=2, branches=2).choice
    assert (choice.kind, choice.ticks, choice.iterations) == ("guidance", 50, 0)
    assert choice.speedup == pytest.approx(2)
    assert settings_of(choice) is None
    reason = plan(linear(0.0), 50, ranks=2, branches=2).reason
    assert "exact; SRDS would run at 0." in reason  # of the serial speed
    kinds = {o.kind for o in plan(linear(0.0), 50, ranks=4, branches=2, images=4).candidates}
    assert kinds == {"serial", "guidance", "images", "srds"}
    choice = plan(linear(0.0), 50, ranks=4, images=4).choice
    assert (choice.kind, choice.speedup) == ("images", pytest.approx(4))


def test_too_few_steps_have_no_blocks() -> None:
    decision = plan(linear(1.0), 2)
    assert decision.choice.kind == "serial" and "too few steps" in decision.reason
    with pytest.raises(ValueError, match="steps is 0"):
        plan(linear(1.0), 0)


@pytest.mark.parametrize("steps", [11, 16, 25, 50, 100, 196, 961])
def test_the_default_is_what_is_picked_where_calls_of_any_size_take_as_long(steps: int) -> None:
    flat = Latency(((1.0, T1), (2.0 * steps, T1)))
    default = len(SRDS().bounds(steps)) - 1
    best = next(one for one in plan(flat, steps).candidates if one.kind == "srds")
    assert best.blocks == default
    assert best.ticks < steps


@pytest.mark.parametrize(
    ("steps", "blocks"), [(1, 1), (2, 1), (3, 2), (4, 2), (10, 5), (25, 13), (50, 17), (100, 20),
                          (196, 22), (961, 34)]
)  # fmt: skip
def test_default_blocks(steps: int, blocks: int) -> None:
    bounds = SRDS().bounds(steps)
    assert len(bounds) - 1 == blocks
    assert (bounds[0], bounds[-1]) == (0, steps)


def test_a_long_plan_has_no_more_blocks_than_the_schedule_takes() -> None:
    assert max(block_counts(20000)) <= 4096
    assert SRDS().bounds(20000)[-1] == 20000


@pytest.mark.parametrize("steps", [3, 7, 25, 196, 961])
def test_block_counts(steps: int) -> None:
    counts = block_counts(steps)
    assert all(1 < B < steps for B in counts) and counts == sorted(set(counts), reverse=True)
    assert len(SRDS().bounds(steps)) - 1 in {*counts, steps}
    assert len(counts) <= 45


def test_expected_iterations_grow_with_the_block() -> None:
    counts = [expected_iterations(B) for B in range(100, 4, -1)]
    assert counts == sorted(counts) and counts[0] == 1
    assert expected_iterations(2) == 2  # exact by then
    assert expected_iterations(13) == pytest.approx(2.8, abs=0.2)
