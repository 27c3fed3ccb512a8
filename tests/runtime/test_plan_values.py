"""`Plan` as a value: plain floats, which nobody can change, and the draws that it says."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sidestep.runtime.plan import _ARRAYS, Plan
from sidestep.runtime.thresholding import DynamicThreshold

K, R, J = 4, 2, 2
DRAWS = (1, 0, 2, 1)


def _plan(**changes: Any) -> Plan:
    random = np.random.default_rng(5)
    matrices = random.standard_normal((K, R, R + 1 + J))
    values = {
        "name": "value",
        "matrices": matrices,
        "timesteps": np.linspace(999, 10, K),
        "input_scales": np.ones(K),
        "draws": DRAWS,
        "errors": random.standard_normal((K, R + 1 + J)),
        "log_snr": np.arange(K),
    }
    return Plan(**{**values, **changes})


# -- one number, one plan -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale", [1, True, np.float64(1), np.float32(1), np.int64(1), torch.tensor(1.0)], ids=repr
)
def test_the_kind_of_number_makes_no_difference(tmp_path: Path, scale: Any) -> None:
    plan = _plan(initial_scale=scale)
    assert plan == _plan(initial_scale=1.0) and type(plan.initial_scale) is float
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan


def test_the_kind_of_string_makes_no_difference(tmp_path: Path) -> None:
    plan = _plan(name=np.str_("value"))
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan == _plan()


@pytest.mark.parametrize("scale", [0, -1.0, np.inf, np.nan])
def test_a_scale_is_finite_and_above_zero(scale: float) -> None:
    with pytest.raises(ValueError, match=r"^Plan: initial_scale is .*, expected a finite number"):
        _plan(initial_scale=scale)


@pytest.mark.parametrize(
    "numbers",
    [
        {"ratio": 1, "minimum": 2, "maximum": 3},
        {"ratio": np.float32(0.9), "minimum": np.float64(1), "maximum": None},
    ],
)
def test_the_kind_of_a_threshold_makes_no_difference(
    tmp_path: Path, numbers: dict[str, Any]
) -> None:
    plain = {key: None if n is None else float(n) for key, n in numbers.items()}
    maps = np.ones((K, R + 1))
    plan = _plan(threshold=DynamicThreshold(**numbers), data_maps=maps)
    assert plan == _plan(threshold=DynamicThreshold(**plain), data_maps=maps)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").threshold == plan.threshold


@pytest.mark.parametrize(
    "numbers", [{"minimum": np.nan}, {"minimum": np.inf}, {"maximum": np.nan}, {"ratio": np.nan}]
)
def test_a_threshold_of_no_number_is_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="DynamicThreshold: "):
        DynamicThreshold(**numbers)


# -- nobody can change it -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [lambda p: p, copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))],
    ids=["itself", "copy", "deepcopy", "pickle"],
)
def test_copies_are_as_immutable_as_the_plan(copied: Any) -> None:
    plan = _plan(threshold=DynamicThreshold(), data_maps=np.ones((K, R + 1)))
    other = copied(plan)
    assert other == plan and other.digest == plan.digest
    assert other.threshold == plan.threshold and other.draws.tolist() == list(DRAWS)
    for key in _ARRAYS:
        array = getattr(other, key)
        np.testing.assert_array_equal(array, getattr(plan, key))
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)


def test_a_copy_is_the_plan_itself() -> None:
    plan = _plan()
    assert copy.copy(plan) is plan and copy.deepcopy([plan])[0] is plan


def test_a_plan_of_no_steps_survives_a_pickle() -> None:
    empty = _plan()[:0]
    assert pickle.loads(pickle.dumps(empty)) == empty and len(empty) == 0


# -- it draws what it says ----------------------------------------------------------------------


def test_run_asks_for_the_draws_of_each_step_only() -> None:
    asked: list[tuple[int, int]] = []
    tape = torch.from_numpy(np.random.default_rng(1).standard_normal((K, J, 3)))

    def noise(k: int, j: int) -> Tensor:
        asked.append((k, j))
        return tape[k, j]

    x = torch.ones(3, dtype=torch.float64)
    result = _plan().run(lambda x, t: torch.tanh(x), x, noise)
    assert asked == [(0, 0), (2, 0), (2, 1), (3, 0)]
    for k, count in enumerate(DRAWS):
        tape[k, count:] = torch.nan
    assert torch.equal(_plan().run(lambda x, t: torch.tanh(x), x, tape), result)
    zeroed = _plan().matrices.copy()
    for k, count in enumerate(DRAWS):
        zeroed[k, :, R + 1 + count :] = 0
    assert torch.equal(_plan(matrices=zeroed).run(lambda x, t: torch.tanh(x), x, tape), result)


def test_a_column_that_is_not_drawn_is_not_used() -> None:
    plan = _plan(draws=[0] * K)
    assert not plan.stochastic and plan.used_draw(2) is None
    plan.run(lambda x, t: x, torch.ones(3))
    rows = plan.table()[:, :-1].reshape(K, R + 1, R + 2)
    assert (rows[:, :, R + 1] == 0).all()


def test_a_generator_replays_the_stream_of_the_scheduler() -> None:
    scheduler = diffusers.KDPM2AncestralDiscreteScheduler()
    plan = Plan.from_scheduler(scheduler, 6)
    assert plan.draws.tolist() == [k % 2 for k in range(len(plan))]
    shape = (1, 4, 5, 3)
    x = start = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * plan.initial_scale
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(8)
    for t in scheduler.timesteps:
        u = torch.tanh(scheduler.scale_model_input(x, t))
        x = scheduler.step(u, t, x, generator=generator).prev_sample
    again = torch.Generator().manual_seed(8)
    found = plan.run(
        lambda x, t: torch.tanh(x), start, lambda k, j: torch.randn(shape, generator=again)
    )
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.get_state(), generator.get_state())


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 2), (0, K), (1, 3)])
def test_hold_keeps_the_columns_that_are_drawn(first: int, last: int) -> None:
    """In order: the first step's draws, then the second's."""
    plan = _plan()
    held = plan.hold(first, last)
    assert held.draws.tolist() == [sum(DRAWS[first:last])] == [held.noise_columns]
    random = np.random.default_rng(6)
    state, u = random.standard_normal(R), 0.7
    noise = [random.standard_normal(DRAWS[k]) for k in range(first, last)]
    stepped = state
    for k in range(first, last):
        drawn = plan.matrices[k, :, : R + 1 + DRAWS[k]]
        stepped = drawn @ np.array([*stepped, u, *noise[k - first]])
    once = held.matrices[0] @ np.array([*state, u, *np.concatenate(noise)])
    np.testing.assert_allclose(once, stepped, rtol=1e-12)
