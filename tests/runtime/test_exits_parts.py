"""The parts of an exit by hand: score, translator, probes, uncertainty; and the static plan."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_course import COURSE, tiny_exits

from sidestep.runtime.exits.budget import OneBudget
from sidestep.runtime.exits.leaving import Sight
from sidestep.runtime.exits.modules import (
    TIME,
    Probes,
    Uncertainty,
    embed_time,
    random_probes,
    zero_translators,
)
from sidestep.runtime.exits.plan import cheapest, translators_plan, weights_of
from sidestep.runtime.exits.rules.adadiff import AdaDiff
from sidestep.runtime.exits.rules.sample import PerSample
from sidestep.runtime.exits.score import exit_score
from sidestep.runtime.methods.criteria.carried_error import carried
from sidestep.runtime.methods.criterion import Course, Decision, Observation


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_score_by_hand() -> None:
    h = torch.tensor([[[3.0, 1.0], [5.0, 9.0]]])  # LN: [1, -1], [-1, 1]
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    score = exit_score(h, weight, torch.tensor([[0.5, 0.0]]))
    expected = [(sigmoid(2.5) + sigmoid(-1.5)) / 2, (sigmoid(-1) + sigmoid(1)) / 2]
    assert score[0].tolist() == pytest.approx(expected, rel=1e-5)
    raw = exit_score(h, weight, torch.tensor([0.5, 0.0]), normalise=False)
    expected = [(sigmoid(6.5) + sigmoid(10.5)) / 2, (sigmoid(1) + sigmoid(9)) / 2]
    assert raw[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert exit_score(h.bfloat16(), weight, torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize("normalise", [True, False])
def test_training_sees_the_score_that_inference_computes(normalise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    h, weight, bias = (
        torch.randn(size, generator=generator) for size in ((3, 7, 24), (5, 24), (3, 5))
    )
    fused = exit_score(h, weight, bias, normalise=normalise)
    trained = exit_score(h, weight.requires_grad_(), bias, normalise=normalise)
    torch.testing.assert_close(trained, fused, rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(trained.sum(), weight)
    assert float(slope.abs().min()) > 0 and not fused.requires_grad
    with torch.no_grad():
        assert torch.equal(exit_score(h, weight, bias, normalise=normalise), fused)


def test_a_fresh_translator_does_nothing_and_another_what_it_says() -> None:
    h = torch.tensor([[[3.0, 1.0], [5.0, 9.0]]])
    translators = zero_translators(2, 2)
    assert torch.equal(translators(1, h), h)
    translators.matrix[1] = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    translators.offset[1] = torch.tensor([0.0, 0.25])
    expected = torch.tensor([[[1.0, 1.25], [7.0, 9.25]]])
    torch.testing.assert_close(translators(1, h), expected, rtol=1e-5, atol=1e-5)


def test_time_enters_a_probe_through_its_offset() -> None:
    tau = embed_time(torch.tensor(2.0))
    assert tau.shape == (TIME,)
    assert tau[[0, 7, 8]].tolist() == pytest.approx(
        [math.sin(0.25), math.sin(32), math.cos(0.25)], abs=1e-5
    )
    assert torch.equal(embed_time(torch.tensor(-math.inf)), embed_time(torch.tensor(-12.0)))
    probes = random_probes(1, 1, 2, torch.Generator().manual_seed(0))
    timed = Probes(weight=probes.weight, time=torch.ones(1, 1, TIME), bias=torch.full((1, 1), 0.5))
    h = torch.randn(3, 4, 2)
    beta = torch.full((3, 1), 0.5 + float(tau.sum()))
    expected = exit_score(h, probes.weight[0], beta)
    torch.testing.assert_close(timed(0, h, torch.tensor(2.0)), expected)


def test_the_uncertainty_sees_mean_spread_and_time_of_a_pair() -> None:
    inner = torch.zeros(1, 5, 1)
    inner[0, :, 0] = torch.tensor([1.0, 10.0, 100.0, 1000.0, 0.25])
    outer = torch.tensor([[[2.0, 3.0], [0.5, -0.5]]])
    network = Uncertainty(inner=inner, outer=outer)
    scores = torch.tensor([[[0.2]], [[0.4]]])  # two branches of one row, one probe
    f = 0.3 + 10 * 0.2 + 100 * (-0.02 / 4) + 1000 * (0.02 / 4) ** 2 + 0.25
    q = network(0, scores, torch.tensor(-0.02))
    assert q[0].tolist() == pytest.approx([2 * math.tanh(f) + 0.5, 3 * math.tanh(f) - 0.5])


# -- the plan -----------------------------------------------------------------------------------


def test_the_sweep_is_never_worse_than_any_other_plan_of_its_damage() -> None:
    rng = np.random.default_rng(0)
    depths = (1, 2, 4)
    for _ in range(20):
        damages = np.concatenate([rng.random((5, 1)), 0.3 * rng.random((5, 1))], 1)
        damages = np.concatenate([damages, np.zeros((5, 1))], 1)
        for budget in (0.1, 0.3, 0.6, 1.5):
            chosen = cheapest(damages, depths, budget)
            spent = sum(damages[k, i] for k, i in enumerate(chosen))
            cost = sum(depths[i] for i in chosen)
            assert spent <= budget
            for other in itertools.product(range(3), repeat=5):
                if sum(damages[k, i] for k, i in enumerate(other)) <= spent:
                    assert sum(depths[i] for i in other) >= cost


def test_budgets_at_the_ends() -> None:
    damages = np.array([[0.5, 0.1, 0.0], [0.3, 0.2, 0.0]])
    assert cheapest(damages, (1, 2, 3), 0.0) == [2, 2]
    assert cheapest(damages, (1, 2, 3), 0.05) == [2, 2]
    assert cheapest(damages, (1, 2, 3), 0.1001) == [1, 2]
    assert cheapest(damages, (1, 2, 3), 9.0) == [0, 0]


def test_a_plan_carries_what_was_measured_to_another_course() -> None:
    exits = tiny_exits()
    weights = weights_of(exits, COURSE)
    assert weights is not None
    # sensitivity 2 at lambda -2, 8 at lambda 2: between them along the logarithm; 4 at lambda 0
    expected = np.array([2.0, 2.0, 4.0, 8.0]) * np.array(carried(COURSE))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    plan = translators_plan(exits, COURSE, 1e9)
    assert plan is not None and plan.exits == (0,) * 4
    np.testing.assert_allclose(plan.damages, expected * [0.4, 0.4, 0.2, 0.1], rtol=1e-6)
    nobody = translators_plan(exits, COURSE, 0)
    assert nobody is not None and nobody.exits == (2,) * 4 and nobody.damages == (0,) * 4
    assert translators_plan(exits, Course(steps=3), 1.0) is None
    assert translators_plan(exits, Course(steps=3, log_snr=(0.0, 0.0, 1.0)), 1.0) is None


# -- the rules ----------------------------------------------------------------------------------


def sight(step: int, exit: int, rows: list[int] | None) -> Sight:
    return Sight(step=step, exit=exit, hidden=torch.zeros(4, 3, 2), rows=rows)


def test_the_ledger_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = PerSample(tiny_exits(), 0.1)
    rule.start(COURSE)
    damages = {0: [0.02, 0.06], 1: [0.02, 0.024]}
    monkeypatch.setattr(
        rule, "_damages", lambda seen, *_: torch.tensor(damages[seen.exit], dtype=torch.float64)
    )
    assert rule._plan is not None
    share = rule._plan.damages[0]
    allowed = min(0.1, max(share, 0.1 / 4))
    assert 0.024 < allowed < 0.06
    assert rule.leave(sight(0, 0, [0, 1, 0, 1])) == [True, False, True, False]
    assert rule.spent == {}
    rule.cancel()
    assert rule.leave(sight(0, 0, [0, 1, 0, 1])) == [True, False, True, False]
    assert rule.leave(sight(0, 1, [1, 0, 1, 0])) == [True, True, True, True]
    rule.commit()
    assert rule.spent == pytest.approx({0: 0.024, 1: 0.02})
    rule.spent[0] = 0.1  # nothing is left
    assert rule.leave(sight(1, 0, [0, 1, 0, 1])) == [False, False, False, False]
    assert rule.leave(sight(1, 0, None)) is None
    assert rule.leave(sight(1, 0, [0, 0, 1, 2])) is None
    rule.start(COURSE)
    assert rule.spent == {}


def test_the_first_step_goes_by_the_translators_plan() -> None:
    rule = PerSample(tiny_exits(), 0.1)
    rule.start(COURSE)
    assert rule._plan is not None
    rule._plan = replace(rule._plan, exits=(1, 2, 2, 2), damages=(0.08, 0.0, 0.0, 0.0))
    assert rule.leave(sight(0, 0, None)) is None
    assert rule.leave(sight(0, 1, None)) == [True] * 4
    rule.commit()
    left = 0.1 - 0.08
    assert rule._allowed(rule._plan, 0, 3) == pytest.approx(left)
    assert rule.pay(0, 3, left * 0.99) and not rule.pay(0, 3, left * 0.02)
    assert rule.pay(1, 3, left * 0.99)
    assert rule.leave(sight(1, 1, None)) is None


def test_other_rows_have_spent_what_any_of_those_before_has() -> None:
    rule = PerSample(tiny_exits(), 0.1)
    rule.start(COURSE)
    plan = rule._plan
    assert plan is not None
    rule._first, rule.spent = 0.01, {0: 0.02, 1: 0.05}
    rule.resume(COURSE.after(1), 1)
    assert rule._plan is not None and rule._plan.weights == plan.weights[1:]
    assert rule.spent == {} and rule._allowed(rule._plan, 5, 2) == pytest.approx(0.1 - 0.06)
    rest = COURSE.after(1)
    assert COURSE.steps is not None and COURSE.log_snr is not None
    assert (rest.steps, list(rest.log_snr or ())) == (COURSE.steps - 1, list(COURSE.log_snr[1:]))


class Proposes:
    """Skips where a number is not above 1; the number is the error."""

    history = 2

    def __init__(self, values: list[list[float]]) -> None:
        self.values = values

    def start(self, course: Course) -> None:
        self.started = course

    def observe(self, seen: Observation) -> Decision:
        values = self.values[seen.step]
        return Decision(
            compute=[value > 1 for value in values],
            reasons=["criterion" if value > 1 else "skipped" for value in values],
            value=torch.tensor(values, dtype=torch.float64),
        )


def test_skips_and_exits_are_paid_from_one_budget() -> None:
    ledger = PerSample(tiny_exits(), 0.1)
    ledger.start(COURSE)
    assert ledger._plan is not None
    ledger._plan = replace(ledger._plan, damages=(0.0,) * 4)  # what is left is shared evenly
    criterion = OneBudget(Proposes([[0.03, 0.04], [0.05, 2.0], [0.2, 0.05]]), ledger)
    criterion.start(replace(COURSE, rows=2, steps=50))  # of 50 steps a number is the error itself
    x = torch.zeros(2, 1)

    def observe(step: int, computed: list[bool]) -> Decision:
        return criterion.observe(Observation(step=step, x=x, x_next=x, output=x, computed=computed))

    first = observe(0, [True, True])  # for step 1: 0.1 / 3 is allowed
    assert first.compute == [False, True] and first.reasons == ["skipped", "budget"]
    assert ledger.spent == pytest.approx({0: 0.03})
    second = observe(1, [False, True])  # the run of row 0 goes on and pays the increase only
    assert second.compute == [False, True] and second.reasons == ["skipped", "criterion"]
    assert ledger.spent == pytest.approx({0: 0.05})
    third = observe(2, [False, True])
    assert third.compute == [True, False] and third.reasons == ["budget", "skipped"]
    assert ledger.spent == pytest.approx({0: 0.05, 1: 0.05})


def test_a_skip_that_could_not_be_made_was_paid_and_the_next_run_begins_anew() -> None:
    ledger = PerSample(tiny_exits(), 1.0)
    ledger.start(COURSE)
    criterion = OneBudget(Proposes([[0.03], [0.04]]), ledger)
    criterion.start(replace(COURSE, rows=1, steps=50))
    x = torch.zeros(1, 1)
    for step in range(2):  # the driver computed step 1 in spite of it
        criterion.observe(Observation(step=step, x=x, x_next=x, output=x, computed=[True]))
    assert ledger.spent == pytest.approx({0: 0.07})


@pytest.mark.parametrize("steps", [10, 250])
def test_a_skip_costs_the_error_of_the_picture_at_any_number_of_steps(steps: int) -> None:
    ledger = PerSample(tiny_exits(), 1.0)
    ledger.start(COURSE)
    number = 0.03 * (steps / 50) ** 0.75  # what the criterion makes of an error of 0.03
    criterion = OneBudget(Proposes([[number]]), ledger)
    criterion.start(replace(COURSE, rows=1, steps=steps))
    x = torch.zeros(1, 1)
    criterion.observe(Observation(step=0, x=x, x_next=x, output=x, computed=[True]))
    assert ledger.spent == pytest.approx({0: 0.03})


@pytest.mark.parametrize(
    ("switches", "rows", "expected"),
    [
        ({}, [0, 1, 0, 1], [True, False, True, False]),  # means 0.25 and 0.55
        ({"branches_apart": True}, [0, 1, 0, 1], [True, False, False, True]),
        ({"branches_apart": True}, None, [True, False, False, True]),
        ({"batch_mean": True}, [0, 1, 0, 1], [False] * 4),  # 0.4
        ({"batch_mean": True}, None, [False] * 4),
        ({"batch_mean": True, "branches_apart": True}, [0, 1, 0, 1], [False] * 4),  # .45, .35
        ({}, None, None),
    ],
)
def test_adadiff_and_its_deviations(
    switches: dict, rows: list[int] | None, expected: list[bool] | None
) -> None:
    switches = {"batch_mean": False, "branches_apart": False, **switches}
    rule = AdaDiff(tiny_exits(kind="faithful"), 0.35, **switches)
    rule.start(COURSE)
    rule._probes = lambda *_, **__: torch.tensor([[0.1], [0.8], [0.4], [0.3]])  # type: ignore[assignment]
    rule._probes.tensors = lambda: {"weight": torch.zeros(1)}  # type: ignore[attr-defined]
    assert rule.leave(sight(0, 0, rows)) == expected
