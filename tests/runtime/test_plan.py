"""`Plan`: what it is, what it means when run, what it refuses, and its file."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from sidestep.runtime.plan import Plan
from sidestep.runtime.thresholding import DynamicThreshold

K, R, J = 6, 3, 2


def _plan(**changes: Any) -> Plan:
    random = np.random.default_rng(5)
    matrices = random.standard_normal((K, R, R + 1 + J))
    matrices[:, :, R + 1] = 0  # of two draws the second is used
    matrices[0, :, 1:R] = 0
    values = {
        "name": "random",
        "matrices": matrices,
        "timesteps": np.linspace(999, 10, K),
        "input_scales": random.uniform(0.1, 1, K),
        "initial_scale": 14.6,
        "draws": np.full(K, J),
        "errors": random.standard_normal((K, R + 1 + J)),
        "log_snr": np.array([-np.inf, -2, -1, 0, 1, 2]),
    }
    return Plan(**{**values, **changes})


def _model(x: Tensor, t: float) -> Tensor:
    return torch.tanh(x) * (1 + t / 1000)


NOISE = torch.from_numpy(np.random.default_rng(1).standard_normal((K, J, 2, 4, 3)))
START = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 4, 3)))


# -- what it is ---------------------------------------------------------------------------------


def test_a_plan_knows_its_size() -> None:
    plan = _plan()
    assert (len(plan), plan.registers, plan.noise_columns, plan.stochastic) == (K, R, J, True)
    still = plan.matrices.copy()
    still[:, :, R + 1 :] = 0
    assert not _plan(matrices=still).stochastic


def test_a_plan_is_immutable() -> None:
    plan = _plan()
    with pytest.raises(FrozenInstanceError):
        plan.name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        plan.matrices[0, 0, 0] = 1


def test_a_plan_keeps_a_copy_of_what_it_is_given() -> None:
    matrices = np.ones((1, 1, 2))
    plan = Plan(name="p", matrices=matrices, timesteps=[1.0], input_scales=[1.0])
    matrices[:] = 7
    assert plan.matrices.tolist() == [[[1, 1]]] and matrices.flags.writeable


def test_equal_plans_are_equal_and_have_one_hash() -> None:
    assert _plan() == _plan() and hash(_plan()) == hash(_plan())
    assert len({_plan(), _plan()}) == 1
    assert _plan() != "random"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"initial_scale": 14.600000000000001},
        {"timesteps": np.linspace(999, 11, K)},
        {"input_scales": np.ones(K)},
        {"draws": np.ones(K)},
        {"errors": None},
        {"log_snr": None},
        {"matrices": np.nextafter(_plan().matrices, 9)},
        {"threshold": DynamicThreshold(), "data_maps": np.ones((K, R + 1))},
    ],
    ids=lambda c: next(iter(c)),
)
def test_any_difference_makes_another_plan(changes: dict[str, Any]) -> None:
    assert _plan(**changes) != _plan() and _plan(**changes).digest != _plan().digest


def test_repr_and_describe_are_for_people() -> None:
    matrices = np.array([[[0.5, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0]],
                         [[1.0, -1.0, 0.0, 0.25], [0.0, 0.0, 0.0, 0.0]]])  # fmt: skip
    plan = Plan(name="two", matrices=matrices, timesteps=[999, 20.5], input_scales=[1, 1])
    assert repr(plan) == "<Plan two: 2 calls, 2 registers, stochastic, t 999 -> 20.5>"
    assert plan.describe().splitlines()[1:] == [
        "   0  t=999        x = +0.5 x +2 u",
        "   1  t=20.5       x = +1 x -1 r1 +0.25 z0; r1 = 0",
    ]
    assert repr(plan[:0]) == "<Plan two[0:0]: 0 calls, 2 registers>"


def test_draws_default_to_the_noise_that_is_used() -> None:
    matrices = np.zeros((3, 1, 4))
    matrices[0, 0, 2] = matrices[1, 0, 3] = 1
    plan = Plan(name="p", matrices=matrices, timesteps=[3, 2, 1], input_scales=[1, 1, 1])
    assert plan.draws.tolist() == [1, 2, 0]
    assert [plan.used_draw(k) for k in range(3)] == [0, 1, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrices": np.ones((K, R))}, r"matrices has shape \[6, 3\], expected \[K, R, R \+ 1"),
        ({"matrices": np.ones((K, 3, 3))}, r"matrices has shape \[6, 3, 3\]"),
        ({"matrices": np.ones((K, 0, 3))}, r"matrices has shape \[6, 0, 3\]"),
        ({"matrices": np.ones((K, 7, 8))}, "7 registers, expected at most 6"),
        ({"timesteps": np.ones(K + 1)}, r"timesteps has shape \[7\], expected \[6\]"),
        ({"input_scales": np.ones((K, 1))}, r"input_scales has shape \[6, 1\], expected \[6\]"),
        ({"errors": np.ones((K, R))}, r"errors has shape \[6, 3\], expected \[6, 6\]"),
        ({"matrices": np.full((K, R, R + 1 + J), np.nan)}, "matrices is not finite at step 0"),
        ({"timesteps": [1, 2, 3, np.inf, 5, 6]}, "timesteps is not finite at step 3 of random"),
        ({"draws": np.full(K, J + 1)}, "draws is 3 at step 0, expected 0 to 2"),
        ({"draws": np.full(K, -1)}, "draws is -1 at step 0, expected 0 to 2"),
        ({"threshold": DynamicThreshold()}, "threshold and data_maps go together"),
        ({"data_maps": np.ones((K, R + 1))}, "threshold and data_maps go together"),
    ],
)
def test_what_is_no_plan(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _plan(**changes)


# -- what it means ------------------------------------------------------------------------------


def test_run_is_the_matrix_product_of_every_step() -> None:
    plan = _plan()
    seen, latents = [], []

    def model(x: Tensor, t: float) -> Tensor:
        seen.append((x, t))
        return _model(x, t)

    result = plan.run(model, START, NOISE, callback=lambda k, x: latents.append((k, x)))
    state = np.stack([START.numpy(), *[np.zeros(START.shape)] * (R - 1)])
    for k in range(K):
        scaled = plan.input_scales[k] * state[0]
        np.testing.assert_allclose(seen[k][0], scaled, rtol=1e-12)
        assert seen[k][1] == plan.timesteps[k] and isinstance(seen[k][1], float)
        u = _model(torch.from_numpy(scaled), plan.timesteps[k]).numpy()
        state = np.einsum("ij,j...->i...", plan.matrices[k], np.stack([*state, u, *NOISE[k]]))
        np.testing.assert_allclose(latents[k][1], state[0], rtol=1e-11, atol=1e-11)
    np.testing.assert_array_equal(result, latents[-1][1])
    assert [k for k, _ in latents] == list(range(K))


def test_run_takes_noise_as_a_function() -> None:
    plan = _plan()
    expected = plan.run(_model, START, NOISE)
    assert torch.equal(plan.run(_model, START, lambda k, j: NOISE[k, j]), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_run_stays_in_the_dtype_of_the_latent(dtype: torch.dtype) -> None:
    assert _plan().run(_model, START.to(dtype), NOISE.to(dtype)).dtype == dtype


def test_a_stochastic_plan_needs_noise() -> None:
    with pytest.raises(ValueError, match=r"Plan.run: random is stochastic, expected noise"):
        _plan().run(_model, START)


def test_nan_in_what_a_step_does_not_use_does_not_spread() -> None:
    """The unused draw, a register that is not read, an output that is not read."""
    matrices = np.zeros((3, 2, 4))
    matrices[:, 0, 0] = 1
    matrices[0, 1, 2] = 1  # the register takes the output, which is NaN
    matrices[2, 0, 2] = 1  # the last output is used
    plan = Plan(name="p", matrices=matrices, timesteps=[3, 2, 1], input_scales=[1, 1, 1])
    noise = torch.full((3, 1, 2, 4, 3), torch.nan)
    result = plan.run(lambda x, t: x * torch.nan if t > 1 else x, START, noise)
    assert torch.equal(result, 2 * START)


def test_a_threshold_stands_between_the_model_and_the_matrices() -> None:
    threshold = DynamicThreshold(ratio=0.9, maximum=1.5)
    maps = np.random.default_rng(4).standard_normal((K, R + 1))
    plan = _plan(threshold=threshold, data_maps=maps)
    result = plan[:1].run(_model, START, NOISE)
    u = _model(plan.input_scales[0] * START, 999.0)
    x0 = threshold(maps[0, 0] * START + maps[0, R] * u)
    row = plan.matrices[0, 0]
    torch.testing.assert_close(result, row[0] * START + row[R] * x0 + row[R + 2] * NOISE[0, 1])
    for refused in (plan.table, lambda: plan.hold(0, 2)):
        with pytest.raises(ValueError, match="threshold"):
            refused()


@pytest.mark.parametrize(("first", "last"), [(0, 1), (0, K), (2, 5), (K - 1, K)])
def test_hold_is_a_run_with_the_first_output_held(first: int, last: int) -> None:
    """On all registers: the held step is one matrix, so any state will do."""
    plan = _plan()
    held = plan.hold(first, last)
    state = np.random.default_rng(6).standard_normal(R)
    u, noise = 0.7, np.random.default_rng(7).standard_normal((last - first, J))
    stepped = state
    for k in range(first, last):
        stepped = plan.matrices[k] @ np.array([*stepped, u, *noise[k - first]])
    once = held.matrices[0] @ np.array([*state, u, *noise.ravel()])
    np.testing.assert_allclose(once, stepped, rtol=1e-12)
    assert (len(held), held.registers) == (1, R)
    assert held.timesteps == plan.timesteps[first]
    assert held.input_scales == plan.input_scales[first]
    assert held.draws.tolist() == [plan.draws[first:last].sum()]
    assert held.name == f"random hold[{first}:{last}]"


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 2), (-1, 2), (0, K + 1)])
def test_hold_refuses_other_ranges(first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"steps {first}:{last} asked of a plan of 6"):
        _plan().hold(first, last)


def test_slices_are_plans_that_continue_each_other() -> None:
    plan = _plan()
    assert [len(plan[s]) for s in (slice(2, 5), slice(None), slice(-2, None), slice(4, 2))] == [
        3, 6, 2, 0,
    ]  # fmt: skip
    np.testing.assert_array_equal(plan[2:5].matrices, plan.matrices[2:5])
    np.testing.assert_array_equal(plan[2:5].log_snr, plan.log_snr[2:5])
    whole = plan[1:4].hold(0, 3).matrices
    np.testing.assert_array_equal(whole, plan.hold(1, 4).matrices)
    assert plan[2:5].name == "random[2:5]"


@pytest.mark.parametrize("index", [3, slice(0, 4, 2), slice(None, None, -1), "a"])
def test_other_indices_are_refused(index: Any) -> None:
    with pytest.raises(ValueError, match="expected a slice of consecutive steps"):
        _plan()[index]


# -- what the fused step reads ------------------------------------------------------------------


def test_the_table_is_laid_out_as_the_kernel_reads_it() -> None:
    plan = _plan()
    table = plan.table()
    assert table.dtype == torch.float32 and table.shape == (K, (R + 1) * (R + 2) + 1)
    columns = [*range(R + 1), R + 2]  # registers, output, the draw that is used
    for k in range(K):
        rows = table[k, :-1].reshape(R + 1, R + 2).numpy()
        np.testing.assert_array_equal(rows[:R], np.float32(plan.matrices[k][:, columns]))
        np.testing.assert_array_equal(rows[R], np.float32(plan.errors[k][columns]))
    np.testing.assert_array_equal(table[:-1, -1], np.float32(plan.input_scales[1:]))
    assert table[-1, -1] == 1


def test_a_table_has_room_for_one_draw_a_step() -> None:
    matrices = _plan().matrices.copy()
    matrices[3, 0, R + 1] = 1
    with pytest.raises(ValueError, match="step 3 of random uses 2 draws, expected 1"):
        _plan(matrices=matrices).table()


def test_a_table_without_errors_has_zeros() -> None:
    rows = _plan(errors=None).table()[:, :-1].reshape(K, R + 1, R + 2)
    assert (rows[:, R] == 0).all()


# -- one small file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"errors": None, "log_snr": None, "name": "\u03c3 \U0001f40c"}, {"initial_scale": 1 / 3},
     {"threshold": DynamicThreshold(ratio=0.9, maximum=None), "data_maps": np.ones((K, R + 1))}],
    ids=["full", "bare", "scale", "threshold"],
)  # fmt: skip
def test_a_plan_survives_its_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    plan, path = _plan(**changes), tmp_path / "plan.safetensors"
    plan.save(path)
    loaded = Plan.load(str(path))
    assert loaded == plan and loaded.describe() == plan.describe()
    assert loaded.threshold == plan.threshold and loaded.initial_scale == plan.initial_scale
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


def test_saving_twice_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    _plan().save(path)
    _plan(name="second").save(path)
    assert Plan.load(path).name == "second"


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    with pytest.raises(OSError):
        _plan().save(tmp_path / "plan")
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"Plan.load: no file at"):
            Plan.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"not a plan", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{}      "]
)
def test_other_files_are_no_plans(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan").write_bytes(content)
    with pytest.raises(ValueError, match=r"Plan.load: .* is not a plan"):
        Plan.load(tmp_path / "plan")


def test_a_truncated_file_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    _plan().save(path)
    content = path.read_bytes()
    for length in (7, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a plan"):
            Plan.load(path)


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    _plan().save(path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="was altered, its digest does not match"):
        Plan.load(path)


def _rewrite(path: Path, metadata: dict[str, str], arrays: dict[str, Any]) -> None:
    """Saves the plan again with other metadata or arrays; None drops one."""
    _plan().save(path)
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    kept = {**load_file(path), **arrays}
    save_file(
        {k: v for k, v in kept.items() if v is not None},
        path,
        metadata={**header["__metadata__"], **metadata},
    )


@pytest.mark.parametrize(
    ("metadata", "arrays"),
    [
        ({"format": "sidestep-plan-99"}, {}),
        ({"threshold": "{"}, {}),
        ({"threshold": "5"}, {}),
        ({"threshold": '{"ratio": 9}'}, {}),
        ({"threshold": '{"power": 2}'}, {}),
        ({"threshold": "[" * 100_000}, {}),
        ({"initial_scale": "large"}, {}),
        ({}, {"matrices": None}),
        ({}, {"timesteps": None}),
        ({}, {"matrices": np.zeros((K, R, R + 2 + J))}),
        ({}, {"timesteps": np.full(K, np.nan)}),
        ({}, {"draws": np.zeros(K + 1, dtype=np.int64)}),
    ],
)
def test_hostile_files_are_refused(
    tmp_path: Path, metadata: dict[str, str], arrays: dict[str, Any]
) -> None:
    path = tmp_path / "plan"
    _rewrite(path, metadata, arrays)
    with pytest.raises(ValueError, match="is not a plan"):
        Plan.load(path)


@pytest.mark.parametrize(
    ("metadata", "arrays"),
    [({"name": "other"}, {}), ({"digest": "0"}, {}), ({}, {"errors": None})],
)
def test_altered_files_are_refused(
    tmp_path: Path, metadata: dict[str, str], arrays: dict[str, Any]
) -> None:
    _rewrite(tmp_path / "plan", metadata, arrays)
    with pytest.raises(ValueError, match="was altered"):
        Plan.load(tmp_path / "plan")


def test_a_copy_with_other_arrays_is_checked_like_a_new_plan() -> None:
    with pytest.raises(ValueError, match="timesteps has shape"):
        replace(_plan(), timesteps=np.ones(2))
