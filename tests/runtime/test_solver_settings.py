"""Settings of `Solver`: what they change, how a plan reads, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from sidestep.runtime.grids import Custom, Karras, TimeUniform, Trailing
from sidestep.runtime.predictions import PREDICTIONS, find_prediction
from sidestep.runtime.schedules import DiscreteVP
from sidestep.runtime.solvers import SOLVERS, Solver, find_solver

SD = DiscreteVP.scaled_linear()


def test_begin_leaves_out_the_first_calls() -> None:
    """Also inside a step of several calls, which then starts at lower order."""
    for name, solver in SOLVERS.items():
        if solver.stochastic:
            continue
        whole = solver.plan(SD, "karras", 12)
        assert whole.log_snr is not None
        for begin in range(1, 6):
            rest = solver.plan(SD, "karras", 12, begin=begin)
            assert len(rest) == len(whole) - begin, (name, begin)
            np.testing.assert_array_equal(rest.timesteps, whole.timesteps[begin:])
            assert rest.log_snr is not None and rest.log_snr[0] == whole.log_snr[begin]
    with pytest.raises(ValueError, match="begin is 12"):
        SOLVERS["ddim"].plan(SD, "karras", 12, begin=12)


@pytest.mark.parametrize("begin", [1, 5, 11])
def test_heun_cut_inside_a_pair_first_makes_a_call_that_moves_nothing(begin: int) -> None:
    """The rest is the plan that begins at the pair's end."""
    grid = Karras(final="sigma_min")
    cut = SOLVERS["heun"].plan(SD, grid, 12, begin=begin)
    np.testing.assert_array_equal(cut.matrices[0, 0], np.eye(1, cut.matrices.shape[2])[0])
    if begin < 11:
        rest = SOLVERS["heun"].plan(SD, grid, 12, begin=begin + 1)
        np.testing.assert_array_equal(cut.matrices[1:], rest.matrices)
        assert cut.initial_scale == rest.initial_scale


def test_lower_order_final_rules() -> None:
    grid = TimeUniform(final=0.1)

    def errors(rule: bool | int, steps: int) -> list[bool]:
        plan = Solver(order=3, lower_order_final=rule).plan(SD, grid, steps)
        return (plan.errors != 0).any(axis=1).tolist()  # order 1 has no embedded estimate

    assert errors(True, 6) == [False, True, True, True, True, False]
    assert errors(False, 6) == [False, True, True, True, True, True]
    assert errors(7, 6) == errors(True, 6)
    assert errors(6, 6) == errors(False, 6)


def test_plans_are_values_and_read_well() -> None:
    plan = find_solver("dpmsolver++2m").plan(SD, Custom(sigmas=(10.0, 3.0, 1.0, 0.2)))
    again = find_solver("dpmsolver++2m").plan(SD, Custom(sigmas=(10.0, 3.0, 1.0, 0.2)))
    assert plan == again and hash(plan) == hash(again)
    assert plan != find_solver("dpmsolver++2m-heun").plan(SD, Custom(sigmas=(10.0, 3.0, 1.0, 0.2)))
    assert repr(plan).startswith("<Plan dpmsolver++ order 2: 4 calls, 2 registers, t ")
    assert "r1 = " in plan.describe()
    assert (
        Solver(variant="heun", noise="sde").label == "dpmsolver++ order 2, variant=heun, noise=sde"
    )


def test_registers_are_few() -> None:
    counts = {
        "ddim": 1,
        "dpmsolver++2m": 2,
        "dpmsolver++3m": 3,
        "heun": 2,
        "unipc2": 4,
        "unipc3": 5,
    }
    for name, count in counts.items():
        assert SOLVERS[name].plan(SD, Trailing(), 12).registers == count
    assert all(s.plan(SD, Trailing(), 12).registers <= 6 for s in SOLVERS.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "euler"}, "algorithm is 'euler', expected dpmsolver"),
        ({"order": 4}, "order is 4, expected 1 to 3"),
        ({"algorithm": "heun", "order": 1}, "order is 1, expected 2 to 2 for heun"),
        ({"variant": "bh1"}, "variant 'bh1' does not belong to dpmsolver"),
        ({"algorithm": "unipc", "variant": "heun"}, "variant 'heun' does not belong to unipc"),
        ({"algorithm": "ipndm", "variant": "heun"}, "variant 'heun' does not belong"),
        ({"algorithm": "unipc", "method": "singlestep"}, "needs a dpmsolver algorithm"),
        ({"algorithm": "unipc", "noise": "sde"}, "noise 'sde' needs a dpmsolver"),
        ({"noise": "ancestral"}, "noise 'ancestral' needs order 1"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"inverse": True, "noise": "sde"}, "inverse needs noise 'ode'"),
        ({"inverse": True, "denoise_to_zero": True}, "contradict each other"),
        ({"start_order": "singlestep", "order": 1}, "start_order 'singlestep' needs"),
        ({"coordinates": "edm"}, "coordinates is 'edm', expected native, ve"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Solver(**settings)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: find_solver("x"), "solver 'x' is unknown, expected one of ddim"),
        (lambda: Solver().plan(SD, "x", 5), "grid 'x' is unknown"),
        (lambda: Solver().plan(SD, "karras", 5, "x"), "prediction 'x' is unknown"),
        (lambda: Solver().plan(SD, "karras"), "steps is None"),
        (lambda: Solver().plan(SD, "karras", 0), "steps is 0, expected at least 1"),
        (
            lambda: Solver(denoise_to_zero=True).plan(SD, Trailing(final="sigma_min"), 1),
            "steps is 1, expected at least 2 with denoise_to_zero",
        ),
        (
            lambda: Solver(inverse=True).plan(SD, "karras", 5),
            "inverse needs a grid that ends above",
        ),
        (
            lambda: Solver(denoise_to_zero=True).plan(SD, "karras", 5),
            "denoise_to_zero needs a grid",
        ),
        (
            lambda: Solver(method="singlestep", orders="fixed").plan(SD, "karras", 4),
            "orders 'fixed' cannot make 4 calls",
        ),
        (
            lambda: Solver(algorithm="dpmsolver", noise="sde").plan(
                DiscreteVP.scaled_linear(rescale_zero_snr=True), "linspace", 4, "v"
            ),
            "no finite step from a start without signal",
        ),
    ],
)
def test_impossible_plans_are_refused(plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan()


def test_prediction_names() -> None:
    assert find_prediction("v") is find_prediction("v_prediction") is PREDICTIONS["v"]
    assert find_prediction(PREDICTIONS["score"]) is PREDICTIONS["score"]
