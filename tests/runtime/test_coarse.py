"""Coarse solvers that look back to the block before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import SCHEDULE, conditioning, latents, loop, network, plan_of, run, solo
from torch import Tensor

from sidestep.runtime.engine import Engine, Request, Result
from sidestep.runtime.engine_parareal import Image, Parareal
from sidestep.runtime.methods.coarse import COARSE, Hold, TwoStep
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.parareal import parareal
from sidestep.runtime.plan import Plan
from sidestep.runtime.plan_course import data_maps
from sidestep.runtime.predictions import find_prediction
from sidestep.runtime.schedules import FlowMatching
from sidestep.runtime.solvers import find_solver

BOUNDS = (0, 2, 5, 6, 9, 12)
LOOKS_BACK = [name for name, kind in COARSE.items() if kind.looks_back]
CPU = torch.device("cpu")


def flow_plan(steps: int) -> Plan:
    return find_solver("ddim").plan(
        FlowMatching(shift=3.0), "linspace", steps, prediction="flow_prediction"
    )


def curved(x: Tensor, t: float) -> Tensor:
    return torch.tanh(0.7 * x + 1e-4 * t) - 0.1 * x * x.sin()


# -- the formulas, written down again ------------------------------------------------------------


class ByHand:
    """DDIM, and DPM-Solver++ 2M over the ends of its blocks, on one float64 latent."""

    def __init__(self, plan: Plan, prediction: str) -> None:
        assert plan.log_snr is not None
        self.plan, self.snr = plan, plan.log_snr
        self.noise = np.exp(-np.maximum(self.snr, -30))
        flow = prediction == "flow_prediction"
        self.alpha = 1 / (1 + self.noise) if flow else 1 / np.hypot(1, self.noise)
        self.sigma = self.alpha * self.noise
        self.prediction = find_prediction(prediction)

    def data(self, x: Tensor, k: int) -> Tensor:
        a, b = self.prediction.data(float(self.alpha[k]), float(self.sigma[k]))
        return a * x + b * curved(x, float(self.plan.timesteps[k]))

    def output(self, x: Tensor, t: float, data: Tensor) -> Tensor:
        """Of a model that predicts that x0."""
        k = self.plan.timesteps.tolist().index(t)
        a, b = self.prediction.data(float(self.alpha[k]), float(self.sigma[k]))
        return (data - a * x) / b

    def fine(self, x: Tensor, first: int, last: int) -> Tensor:
        return self.plan[first:last].run(curved, x)

    def coarse(self, starts: Sequence[Tensor], block: int) -> Tensor:
        """DPM-Solver++ (Lu et al. 2022), Alg. 2: from the starts of the blocks up to this one."""
        s, t = BOUNDS[block], BOUNDS[block + 1]
        x, now = starts[block], self.data(starts[block], s)
        h = self.snr[t] - self.snr[s]
        if block == 0:
            v = now
        else:
            before = BOUNDS[block - 1]
            r = (self.snr[s] - self.snr[before]) / h
            v = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * self.data(starts[block - 1], before)
        return self.sigma[t] / self.sigma[s] * x - self.alpha[t] * math.expm1(-h) * v


PLANS = {
    "epsilon": plan_of("ddim", 12),
    "v_prediction": find_solver("ddim").plan(SCHEDULE, "linspace", 12, prediction="v_prediction"),
    "flow_prediction": flow_plan(12),
}


@pytest.mark.parametrize("prediction", PLANS)
def test_2m_is_dpm_solver_over_the_ends_of_the_blocks(prediction: str) -> None:
    """At the last end lambda may be infinite, and the order is 1."""
    plan, x = PLANS[prediction], latents(1, 2).double()
    hand = ByHand(plan, prediction)
    found = parareal(plan, curved, x, BOUNDS, 2, coarse="2m")
    path = [x]
    for block in range(4):
        path.append(hand.coarse(path, block))
    expected = [path]
    for _ in range(2):
        old, path = path, [x]
        for block in range(4):
            F = hand.fine(old[block], BOUNDS[block], BOUNDS[block + 1])
            path.append(F + (hand.coarse(path, block) - hand.coarse(old, block)))
        expected.append(path)
    for iterate, states in zip(expected, found, strict=True):
        for ours, state in zip(iterate, states[:-1], strict=True):
            torch.testing.assert_close(state[:, 0], ours, rtol=1e-9, atol=1e-10)
    start, end = found[0][-2][:, 0], found[0][-1][:, 0]
    held = plan[9:12].run(lambda y, t: hand.output(y, t, hand.data(start, 9)), start)
    torch.testing.assert_close(end, held, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("prediction", PLANS)
def test_2m_guesses_and_krylov_corrects(prediction: str) -> None:
    plan, x = PLANS[prediction], latents(2, 2).double()
    guessed, both = (
        parareal(plan, curved, x, BOUNDS, 1, coarse=name) for name in ("2m", "2m-krylov")
    )
    for state, expected in zip(both[0], guessed[0], strict=True):
        assert torch.equal(state, expected)
    assert torch.equal(both[1][1], guessed[1][1])
    assert not torch.allclose(both[1][3], guessed[1][3])


def test_extrapolate_holds_the_output_of_the_middle_of_the_block() -> None:
    plan, x = plan_of("dpmsolver++2m", 12), latents(3, 1).double()
    snr = plan.log_snr
    assert snr is not None
    (iterate,) = parareal(plan, curved, x, BOUNDS, 0, coarse="extrapolate")
    outputs = [
        curved(state[:, 0], float(plan.timesteps[first]))
        for state, first in zip(iterate, BOUNDS[:-1], strict=False)
    ]
    for block in range(5):
        first, last = BOUNDS[block : block + 2]
        u = outputs[block]
        if 0 < block < 4:
            before = BOUNDS[block - 1]
            middle = (snr[last] - snr[first]) / 2 / (snr[first] - snr[before])
            u = u + (u - outputs[block - 1]) * middle
        held = torch.tensor(plan.hold(first, last).matrices[0])
        vectors = torch.cat([iterate[block], u[:, None]], 1)
        expected = (held @ vectors.flatten(2)).view(iterate[block].shape)
        torch.testing.assert_close(iterate[block + 1], expected, rtol=1e-9, atol=1e-10)


def test_the_held_data_prediction_of_noise_is_the_held_noise() -> None:
    """With x0 and eps constant all samplers follow alpha x0 + sigma eps."""
    plan = plan_of("ddim", 12)
    held, two = Hold(plan, BOUNDS, CPU), TwoStep(plan, BOUNDS, CPU)
    maps = data_maps(plan)
    assert maps is not None
    for block, first in enumerate(BOUNDS[:-1]):
        a, b = maps[first]
        of_data = two.start([block])[0]
        of_output = torch.stack([of_data[:, 0] + a * of_data[:, 1], b * of_data[:, 1]], 1)
        torch.testing.assert_close(of_output, held.start([block])[0], rtol=1e-9, atol=1e-12)


def test_pure_noise_has_no_past_to_extrapolate_from() -> None:
    """lambda is -infinity at the start of flow matching: the second block is of first order too."""
    plan = flow_plan(12)
    assert plan.log_snr is not None and plan.log_snr[0] == -math.inf
    solver = TwoStep(plan, BOUNDS, CPU)
    now, before = torch.ones(3), torch.zeros(3)
    changed = [not torch.equal(solver.ahead(block, now, before), now) for block in range(5)]
    assert changed == [False, False, True, True, False]


# -- in the engine -------------------------------------------------------------------------------

KINDS: dict[str, Plan] = {
    "ddim": plan_of("ddim", 13),
    "2m": plan_of("dpmsolver++2m", 13),
    "unipc": plan_of("unipc2", 13),
    "flow": flow_plan(13),
}


def request_of(plan: Plan, method: Any, n: int = 2) -> Request:
    x = plan.initial_scale * latents(4, n)
    return Request(plan, x, conditioning(4, n, 2), guidance=(-1.5, 2.5), method=method)


def parallel(request: Request, rows: int = 64) -> Result:
    registers = max(5, request.plan.registers)
    return solo(request, capacity=rows, buckets=range(1, 2 * rows + 1), registers=registers)


@pytest.mark.parametrize("spacing", ["steps", "log-snr"])
@pytest.mark.parametrize("coarse", COARSE)
@pytest.mark.parametrize("kind", KINDS)
def test_all_iterations_are_the_serial_sampler_bit_for_bit(
    kind: str, coarse: str, spacing: str
) -> None:
    method = SRDS(exact=True, blocks=5, coarse=coarse, spacing=spacing)
    request = request_of(KINDS[kind], method)
    result = parallel(request)
    assert result.status == "done", result.error
    assert torch.equal(result.x, loop(request))


@pytest.mark.parametrize("coarse", LOOKS_BACK)
@pytest.mark.parametrize("kind", KINDS)
def test_iterates_are_those_of_the_definition(kind: str, coarse: str) -> None:
    plan, shown = KINDS[kind], dict[int, Tensor]()
    method = SRDS(blocks=(0, 1, 5, 6, 9, 13), tolerance=0, max_iterations=3, coarse=coarse)
    request = request_of(plan, method)
    listening = replace(request, on_step=lambda p, x, rows: shown.setdefault(p, x.clone()))
    parallel(listening)
    shift = request.conditioning["shift"].double()

    def guided(x: Tensor, t: float) -> Tensor:
        time = torch.full((2,), t, dtype=torch.float64)
        first, second = (network(x, time, shift[2 * g : 2 * g + 2]) for g in range(2))
        return -1.5 * first + 2.5 * second

    iterates = parareal(
        plan, guided, request.x.double(), method.bounds(plan), 3, coarse=coarse
    )  # fmt: skip
    assert sorted(shown) == [0, 1, 2, 3]
    for p, x in shown.items():
        torch.testing.assert_close(x.double(), iterates[p][-1][:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coarse", LOOKS_BACK)
@pytest.mark.parametrize("capacity", [2, 3, 7])
def test_any_width_and_company_give_the_same_bits(capacity: int, coarse: str) -> None:
    method = SRDS(blocks=(0, 1, 6, 7, 13), tolerance=1e-3, coarse=coarse)
    request = request_of(KINDS["unipc"], method)
    wide = parallel(request)
    engine = Engine(request.x.shape[1:], capacity=capacity, buckets=(1, 2, 4))
    engine.submit(request)
    (narrow,) = run(engine).values()
    assert torch.equal(narrow.x, wide.x)
    assert narrow.summary.iterations == wide.summary.iterations
    alone = replace(
        request, x=request.x[:1], conditioning={"shift": request.conditioning["shift"][::2]}
    )
    assert torch.equal(parallel(alone).x[0], wide.x[0])


def test_nothing_of_the_past_is_kept_of_an_image_that_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[int, Image] = {}
    kept: list[int] = []
    form = Parareal._form

    def forming(self: Parareal, turn: Any) -> list[bool]:
        moved = form(self, turn)
        seen.update((image.index, image) for image, _ in turn)
        kept.extend(len(image.past.values) + len(image.past.before) for image, _ in turn)
        return moved

    monkeypatch.setattr(Parareal, "_form", forming)
    parallel(request_of(KINDS["ddim"], SRDS(blocks=6, exact=True, coarse="2m-krylov")))
    assert len(seen) == 2 and 0 < max(kept) <= 12
    for image in seen.values():
        assert image.finished
        assert not image.past.values and not image.past.before and not image.past.guesses


# -- what cannot be done -------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", LOOKS_BACK)
def test_a_plan_without_lambda_is_refused(coarse: str) -> None:
    plan = replace(plan_of("ddim", 12), log_snr=None, name="DDIM of no lambda")
    with pytest.raises(ValueError, match="DDIM of no lambda does not know its lambda, along which"):
        Engine((3, 5)).submit(request_of(plan, SRDS(coarse=coarse)))


@pytest.mark.parametrize("coarse", ["2m", "2m-krylov"])
def test_a_plan_that_does_not_show_its_prediction_is_refused(coarse: str) -> None:
    plan = plan_of("sde-dpmsolver++2m", 12)
    told = "does not show what the model predicts, for it is stochastic; the coarse solver"
    with pytest.raises(ValueError, match=told):
        COARSE[coarse](plan, BOUNDS, CPU)
