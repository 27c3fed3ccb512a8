"""The definition of SRDS in plain torch: what parareal theory says of it, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from engine_cases import SOLVERS, latents, plan_of
from torch import Tensor

from sidestep.runtime.methods.coarse import COARSE, Hold, Krylov, TwoStep, output_slopes
from sidestep.runtime.methods.criteria.carried_error import SPREAD
from sidestep.runtime.methods.srds import SRDS, formation_ticks
from sidestep.runtime.parareal import parareal
from sidestep.runtime.plan import Plan


def linear_plan(steps: int, factor: float) -> Plan:
    """``x' = x + factor * u / steps``, and no lambda."""
    matrices = np.tile([[[1.0, factor / steps]]], (steps, 1, 1))
    return Plan(
        name="linear",
        matrices=matrices,
        timesteps=np.arange(steps, dtype=np.float64),
        input_scales=np.ones(steps),
    )


def double_noise(plan: Plan, n: int) -> Tensor | None:
    if not plan.stochastic:
        return None
    return latents(5, len(plan) * plan.noise_columns * n).view(len(plan), -1, n, 3, 5).double()


def curved(x: Tensor, t: float) -> Tensor:
    return torch.tanh(0.7 * x + 1e-4 * t) - 0.1 * x * x.sin()


PAIRS = [
    (solver, coarse)
    for solver in SOLVERS
    for coarse in COARSE
    if not (solver.startswith("sde") and issubclass(COARSE[coarse], TwoStep))  # no prediction type
]


@pytest.mark.parametrize(("solver", "coarse"), PAIRS)
def test_every_iteration_makes_one_block_more_exact(solver: str, coarse: str) -> None:
    plan, x = plan_of(solver, 11), latents(1, 2).double()
    bounds = (0, 2, 5, 6, 9, 11)
    noise = double_noise(plan, 2)
    serial: list[Tensor] = []
    plan.run(curved, x, noise, lambda k, y: serial.append(y))
    iterates = parareal(plan, curved, x, bounds, 5, coarse=coarse, noise=noise)
    for p, iterate in enumerate(iterates):
        for block, bound in enumerate(bounds):
            if 0 < block <= p:
                torch.testing.assert_close(
                    iterate[block][:, 0], serial[bound - 1], rtol=1e-12, atol=1e-12
                )
    first, last = ((iterates[p][-1][:, 0] - serial[-1]).abs().max().item() for p in (0, 3))
    assert first > 1e-4  # otherwise the test says nothing
    assert last < first


def test_an_iterate_repeats_what_has_not_changed_bit_for_bit() -> None:
    plan, x = plan_of("dpmsolver++2m", 12), latents(2, 3)
    iterates = parareal(plan, curved, x, (0, 3, 6, 9, 12), 4)
    for p, iterate in enumerate(iterates):
        for block in range(p):
            assert torch.equal(iterate[block], iterates[block][block])


@pytest.mark.parametrize(("decay", "length"), [(-1.3, 4), (0.9, 3), (-4.0, 2)])
def test_a_linear_equation_follows_the_recurrence_of_parareal(decay: float, length: int) -> None:
    """Gander and Vandewalle (2007): with F = f and G = g, e_n^k = alpha e_{n-1}^{k-1} + g e_{n-1}^k
    where alpha = f - g."""
    blocks = 7
    steps = blocks * length
    plan = linear_plan(steps, decay)
    f = (1 + decay / steps) ** length
    g = 1 + decay / steps * length
    bounds = tuple(range(0, steps + 1, length))
    iterates = parareal(
        plan, lambda x, t: x, torch.ones(1, 1).double(), bounds, blocks, coarse="hold"
    )
    errors = np.zeros((blocks + 1, blocks + 1))
    errors[0] = [g**n - f**n for n in range(blocks + 1)]
    for k in range(1, blocks + 1):
        for n in range(1, blocks + 1):
            errors[k, n] = (f - g) * errors[k - 1, n - 1] + g * errors[k, n - 1]
    for k, iterate in enumerate(iterates):
        for n, state in enumerate(iterate):
            assert math.isclose(
                state.item() - f**n, errors[k, n], abs_tol=1e-14 * max(1.0, abs(g) ** n)
            )
            if n <= k:
                assert abs(state.item() - f**n) < 1e-14 * max(1, f**n)


def gaussian(plan: Plan, spread: float) -> list[float]:
    """The factors g_k of ``eps = g_k x`` for Gaussian data of that standard deviation."""
    assert plan.log_snr is not None
    factors = []
    for snr in plan.log_snr.tolist():
        noise = math.exp(-snr)
        alpha = 1 / math.hypot(1, noise)
        factors.append(noise / (alpha * (noise**2 + spread**2)))
    return factors


def test_krylov_knows_what_becomes_of_a_change_where_the_model_is_linear() -> None:
    """Gaussian data, guided: G follows the course that it is taken to, so that C dx is
    F(x + dx) - F(x) though it takes one evaluation in the place of five."""
    plan = plan_of("ddim", 20)
    factors = {
        t: 5 * g for t, g in zip(plan.timesteps.tolist(), gaussian(plan, SPREAD), strict=True)
    }
    x = latents(3, 1).double()
    first, last = 8, 13
    solver = Krylov(plan, (0, first, last, 20), torch.device("cpu"))

    def run(start: Tensor) -> Tensor:
        return plan[first:last].run(lambda y, t: factors[t] * y, start)

    change = latents(4, 1).double()
    u = factors[float(plan.timesteps[first])] * change
    vectors = torch.stack([change, u], 1)
    flat = vectors.flatten(2)
    moved = solver.correction([1], flat @ flat.mT)[0, 0] @ flat[0]
    expected = (run(x + change) - run(x)).flatten()
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)
    held = Hold(plan, (0, first, last, 20), torch.device("cpu")).start([1])[0, 0] @ flat[0]
    assert (held - expected).norm() > 0.05 * expected.norm()


def test_krylov_holds_the_output_where_the_plan_does_not_know_lambda() -> None:
    plan = linear_plan(6, -1.0)
    assert output_slopes(plan) is None
    held, krylov = (
        COARSE[name](plan, (0, 3, 6), torch.device("cpu")) for name in ("hold", "krylov")
    )
    gram = torch.eye(2)[None]
    assert torch.equal(krylov.correction([1], gram), held.correction([1], gram))


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++2m", "unipc2"])
def test_the_correction_of_one_step_is_that_step(solver: str) -> None:
    """A block of a single step: both coarse solvers are exact."""
    plan = plan_of(solver, 9)
    bounds = range(10)
    krylov = Krylov(plan, bounds, torch.device("cpu"))
    vectors = torch.randn(3, plan.registers + 1, 40, dtype=torch.float64)
    found = krylov.correction([2, 5, 8], vectors @ vectors.mT)
    applied = found @ vectors
    for row, block in enumerate((2, 5, 8)):
        matrix = torch.tensor(plan.matrices[block, :, : plan.registers + 1])
        torch.testing.assert_close(applied[row], matrix @ vectors[row], rtol=1e-9, atol=1e-9)


def test_ticks_of_equal_blocks_follow_the_closed_form() -> None:
    for steps, length in ((25, 5), (100, 10), (100, 4), (49, 7)):
        blocks = steps // length
        ticks = formation_ticks(range(0, steps + 1, length), blocks)
        for p in range(blocks + 1):
            for i in range(max(1, p), blocks + 1):
                assert ticks[p, i] == p * (length - 1) + i
        assert ticks[blocks, blocks] == steps


def test_the_default_blocks_are_short() -> None:
    assert SRDS().bounds(25)[:4] == (0, 2, 4, 6)
    assert len(SRDS().bounds(25)) == 14
    assert len(SRDS().bounds(100)) == 21
    assert SRDS(blocks=3).bounds(10) == (0, 3, 7, 10)
    assert SRDS(blocks=[0, 4, 10]).bounds(10) == (0, 4, 10)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tolerance": -1}, "tolerance is -1, expected 0 or more"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"blocks": 0}, "blocks is 0, expected a whole number"),
        ({"max_iterations": 1.5}, "max_iterations is 1.5"),
        ({"width": -2}, "width is -2"),
        ({"blocks": [0, 3.7, 12]}, "blocks is 3.7, expected a whole number of 0 or more"),
        ({"blocks": "abc"}, "blocks is 'abc', expected a whole number"),
        ({"tolerance": "a"}, "tolerance is 'a', expected 0 or more"),
        ({"exact": True, "max_iterations": 2}, "exact with max_iterations=2, expected one of"),
        ({"coarse": "fine"}, "coarse is 'fine', expected one of: 'krylov', 'hold', '2m', '2m-k"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SRDS(**settings)  # type: ignore[arg-type]


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="12 blocks of 10 steps, expected at most 10"):
        SRDS(blocks=12).bounds(10)
    with pytest.raises(ValueError, match=r"blocks are \[0, 4\], expected ascending bounds from 0"):
        SRDS(blocks=[0, 4]).bounds(10)
