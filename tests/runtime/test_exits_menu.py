"""The plan over the whole menu, and the rests that it goes on with."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_course import COURSE, tiny_exits

from sidestep.runtime.exits.layouts import LAYOUTS
from sidestep.runtime.exits.leaving import Leaving, Sight
from sidestep.runtime.exits.menu import LONGEST, Costs, cheapest_course, costs_of, menu_plan
from sidestep.runtime.exits.plan import NOT_CALLED, StaticPlan, translators_plan, weights_of
from sidestep.runtime.exits.rests import Rests, slope
from sidestep.runtime.exits.rules.static import LeftOut, Static
from sidestep.runtime.methods.criterion import Course, Observation

WHOLE = 2


def random_costs(steps: int, seed: int) -> Costs:
    """Two exits of a model of four blocks."""
    rng = np.random.default_rng(seed)
    return Costs(
        depths=np.array([1.0, 3.0, 4.0]),
        translated=2 * rng.random((steps, 2)),
        rest=rng.random((steps, LONGEST, 2)),
        reused=rng.random((steps, LONGEST, LONGEST, 3)),
    )


def cost_of(costs: Costs, choices: tuple[tuple[int, bool], ...], price: float) -> float:
    """By the definition, from the first step on; infinite where it may not be."""
    total, wholes, ended = 0.0, list[int](), WHOLE
    last = -1
    for k, (exit, rest) in enumerate(choices):
        damage = 0.0
        if exit == WHOLE:
            wholes.append(k)
            last, ended = k, WHOLE
        elif exit != NOT_CALLED and not rest:
            if wholes:
                return np.inf
            damage = costs.translated[k, exit]
        elif len(wholes) < 2 or wholes[1] != wholes[0] + 1 or k - wholes[-1] >= LONGEST:
            return np.inf
        elif rest:
            damage = costs.rest[k, k - 1 - wholes[-1], exit]
            last, ended = k, exit
        else:
            damage = costs.reused[k, k - 1 - wholes[-1], k - 1 - last, ended]
        total += (costs.depths[exit] if exit != NOT_CALLED else 0.0) + price * damage
    begin = wholes[0] if wholes else len(choices)
    if any(exit == WHOLE for exit, _ in choices[:begin]):
        return np.inf
    whole_pair = len(wholes) < 2 or wholes[1] == wholes[0] + 1
    lonely = len(wholes) == 1 and wholes[0] != len(choices) - 1
    return total if whole_pair and not lonely else np.inf


@pytest.mark.parametrize("price", [1e-6, 0.3, 1.0, 3.0, 10.0, 1e6])
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_no_other_course_costs_less(steps: int, price: float) -> None:
    options = [(NOT_CALLED, False), (0, False), (0, True), (1, False), (1, True), (WHOLE, False)]
    for seed in range(4):
        costs = random_costs(steps, seed)
        chosen = cheapest_course(costs, price)
        found = cost_of(costs, tuple((c.exit, c.rest) for c in chosen), price)
        depths = [0.0 if c.exit == NOT_CALLED else costs.depths[c.exit] for c in chosen]
        assert sum(depths) + price * sum(c.damage for c in chosen) == pytest.approx(found)
        others = itertools.product(options, repeat=steps)
        assert found <= min(cost_of(costs, other, price) for other in others) + 1e-9
        if price == 1e6:
            assert [c.exit for c in chosen] == [WHOLE] * steps


def test_what_a_choice_costs_by_hand() -> None:
    exits = tiny_exits()
    assert exits.measured is not None
    measured = replace(
        exits.measured,
        stale=torch.tensor([[0.3, 0.3], [0.2, 0.2], [0.1, 0.1]]),
        growth=torch.tensor([[2.0, 2.0], [1.0, 1.0], [0.5, 0.5]]),
    )
    exits = replace(exits, measured=measured)
    weights = weights_of(exits, COURSE)  # lambda: -3, -2, 0, 2
    assert weights is not None
    costs = costs_of(exits, COURSE, weights, reuse=True)
    w = weights[3]
    np.testing.assert_allclose(costs.rest[3, :3, 0], w * 0.2 * np.array([2, 4, 5]), rtol=1e-6)
    np.testing.assert_allclose(costs.rest[3, :3, 1], w * 0.1 * np.sqrt([2, 4, 5]), rtol=1e-6)
    assert np.isinf(costs.rest[3, 3:]).all() and np.isinf(costs.rest[0]).all()
    assert costs.reused[3, 0, 0, 2] == pytest.approx(w * 0.3 * 4, rel=1e-6)
    assert costs.reused[3, 1, 1, 2] == pytest.approx(w * 0.3 * 16, rel=1e-6)
    # the call before left at exit 0 with the rest of the call before that
    assert costs.reused[3, 1, 0, 0] == pytest.approx(w * (0.3 * 4 + 2 * 0.2 * 2), rel=1e-6)
    # both of the last two steps were skipped or early: a call at lambda -2, whole at -3
    assert costs.reused[3, 2, 1, 1] == pytest.approx(w * (0.3 * 16 + 5 * 0.1), rel=1e-6)
    assert np.isinf(costs.reused[3, 0, 0, :2]).all() and np.isinf(costs.reused[3, 1, 0, 2])
    assert np.isinf(costs_of(exits, COURSE, weights, reuse=False).reused).all()
    plan = translators_plan(exits, COURSE, 1e9)
    assert plan is not None
    np.testing.assert_allclose(costs.translated[:, 0], plan.damages, rtol=1e-6)


def test_budgets() -> None:
    exits, course = tiny_exits(), Course(steps=12, log_snr=tuple(np.linspace(-3, 2, 12)))
    for reuse in (True, False):
        depths = []
        for budget in (0.0, 0.05, 0.2, 0.8, 3.0):
            plan = menu_plan(exits, course, budget, reuse=reuse)
            assert plan is not None and sum(plan.damages) <= budget
            assert (NOT_CALLED in plan.exits) <= reuse and len(plan.rests) == 12
            depths.append(sum((0, 1, 3, 4)[exit + 1] for exit in plan.exits))
        assert depths == sorted(depths, reverse=True) and depths[0] == 48 > depths[-1]
    assert menu_plan(exits, Course(steps=3), 1.0, reuse=True) is None
    pure = replace(course, log_snr=(-np.inf, *course.log_snr[1:]))  # type: ignore[index]
    assert menu_plan(exits, pure, 0.8, reuse=True) is not None


# -- rests ----------------------------------------------------------------------------------------

SNR = (-3.0, -2.0, 0.0, 1.0, 2.0)


def plan_of(exits: tuple[int, ...], rests: tuple[bool, ...]) -> StaticPlan:
    zeros = (0.0,) * len(exits)
    return StaticPlan(exits=exits, rests=rests, damages=zeros, weights=zeros)


def call(rests: Rests, step: int, places: list[int], hidden: list[float]) -> None:
    """A whole call: these hidden states after each exit, and at the end."""
    rests.open(step, 0, places)
    for exit, h in enumerate(hidden[:-1]):
        rests.see(exit, torch.full((len(places), 1, 1), h))
    rests.land(torch.full((len(places), 1, 1), hidden[-1]))


def test_rests_are_continued_along_lambda() -> None:
    whole, exit = (WHOLE, False), (1, True)
    rests = Rests(plan_of(*zip(whole, whole, exit, whole, exit, strict=True)), SNR, WHOLE)  # type: ignore[arg-type]
    call(rests, 0, [0, 1], [1.0, 5.0, 6.0])
    call(rests, 1, [0, 1], [1.0, 5.0, 7.0])
    rests.open(2, 0, [0, 1])
    assert rests.due and rests.ready
    # r = 1 at lambda -3 and 2 at -2, hence 4 at 0
    assert rests.add(1, torch.full((2, 1, 1), 10.0)).flatten().tolist() == [14.0, 14.0]
    rests.open(2, 0, [1])
    assert not rests.ready  # other rows than those that were seen
    rests.open(2, 1, [0, 1])
    assert not rests.ready  # another branch
    call(rests, 3, [0, 1], [1.0, 5.0, 5.5])
    rests.open(4, 0, [0, 1])
    assert rests.ready
    # r = 2 at lambda -2 and 0.5 at 1, hence 0 at 2
    assert rests.add(1, torch.zeros(2, 1, 1)).flatten().tolist() == [0.0, 0.0]
    rests.forget()
    assert not rests.ready
    lonely = Rests(plan_of((WHOLE, 0), (False, True)), SNR, WHOLE)  # as is left of a plan
    call(lonely, 0, [0], [1.0, 2.0, 3.0])
    lonely.open(1, 0, [0])
    assert lonely.due and not lonely.ready
    rests.open(9, 0, [0, 1])  # the host takes more steps than it has said
    rests.see(0, torch.zeros(2, 1, 1))
    assert not rests.due


def test_a_call_that_was_cut_off_leaves_no_rest() -> None:
    rests = Rests(plan_of((WHOLE, WHOLE, 0), (False, False, True)), SNR, WHOLE)
    call(rests, 0, [0], [1.0, 2.0, 3.0])
    rests.open(1, 0, [0])
    rests.see(0, torch.zeros(1, 1, 1))
    rests.open(2, 0, [0])  # the model has raised
    assert rests.due and not rests.ready


def test_slope() -> None:
    assert slope(SNR, 3, 2, 1) == 0.5
    assert slope((-np.inf, 0.0, 1.0), 2, 1, 0) == 0.0


def test_rows_whose_rest_is_missing_go_through_the_whole_model() -> None:
    rule = Static(tiny_exits(), 0.1)
    leaving = Leaving(tiny_exits(), LAYOUTS["DiTTransformer2DModel"], rule)
    rule.plan = plan_of((WHOLE, WHOLE, 0), (False, False, True))
    rule.rests = Rests(rule.plan, SNR, WHOLE)
    with leaving.call(2, 2, [0, 1], {}):
        assert leaving.leave(0, torch.zeros(2, 3, 2), [0, 1]) is None
    for step in (0, 1):
        leaving.end_step([True, True])
        with leaving.call(step, 2, [0, 1], {}):
            assert leaving.leave(0, torch.zeros(2, 3, 2), [0, 1]) is None
            leaving.land(torch.full((2, 3, 2), 5.0))
    leaving.end_step([True, True])
    with leaving.call(2, 2, [0, 1], {}):
        hidden = torch.ones(2, 3, 2)
        assert leaving.leave(0, hidden, [0, 1]) == [True, True]
        assert torch.equal(leaving.translate(0, hidden), torch.full((2, 3, 2), 6.0))
    leaving.end_step([True, True])
    leaving.release()
    with leaving.call(2, 2, [0, 1], {}):
        assert leaving.leave(0, torch.zeros(2, 3, 2), [0, 1]) is None


# -- steps without a call -------------------------------------------------------------------------


def test_outputs_are_continued_where_the_plan_leaves_a_call_out() -> None:
    rule = Static(tiny_exits(), 0.1)
    rule.plan = plan_of(
        (WHOLE, WHOLE, NOT_CALLED, NOT_CALLED, WHOLE), (False, False, False, False, False)
    )
    rule.log_snr = SNR
    criterion = LeftOut(rule)
    criterion.start(replace(COURSE, rows=2))
    x = torch.zeros(2, 1)

    def observe(step: int, computed: bool) -> tuple[list[bool], object]:
        seen = Observation(step=step, x=x, x_next=x, output=x, computed=[computed] * 2)
        decision = criterion.observe(seen)
        assert decision.reasons == ["planned" if decision.compute[0] else "skipped"] * 2
        return decision.compute, decision.weights

    assert observe(0, True) == ([True, True], None)
    assert observe(1, True) == ([False, False], [(3.0, -2.0)] * 2)  # from -3, -2 to 0
    assert observe(2, False) == ([False, False], [(4.0, -3.0)] * 2)
    assert observe(3, False) == ([True, True], None)
    assert observe(4, True) == ([True, True], None)
    criterion.start(replace(COURSE, rows=2))
    observe(0, True)
    observe(1, True)
    # step 2 had to be computed: step 3 goes on from there
    assert observe(2, True) == ([False, False], [(1.5, -0.5)] * 2)


def test_sight_of_no_plan() -> None:
    rule = Static(tiny_exits(), 0.1)
    assert rule.leave(Sight(step=0, exit=0, hidden=torch.zeros(1, 1, 2), rows=None)) is None


def test_errors_of_a_multistep_solver_count_twice() -> None:
    exits, twice = tiny_exits(), replace(COURSE, multistep=True)
    once, both = weights_of(exits, COURSE), weights_of(exits, twice)
    assert once is not None and both is not None
    np.testing.assert_allclose(both, 2 * once)
    measured_so = replace(exits, trained={"multistep": True})
    np.testing.assert_allclose(weights_of(measured_so, twice), once)
