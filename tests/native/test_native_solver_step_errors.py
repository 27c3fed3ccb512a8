"""What the native fused step refuses: one sentence, and nothing touched."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from native_problems import Problem, assert_same_bits, random_problem

from sidestep import _native


def set_slot(problem: Problem, slots: list[int]) -> None:
    problem.slot = np.array(slots, np.int64)


def share_output(problem: Problem) -> None:
    problem.outputs[1] = problem.registers[0]


def share_input(problem: Problem) -> None:
    assert problem.model_input is not None
    problem.outputs[0] = problem.model_input[0]


def share_stats(problem: Problem) -> None:
    problem.stats = problem.weights


MISTAKES: list[tuple[Callable[[Problem], object], str]] = [
    (lambda p: p.step.__setitem__(2, 5), "solver_step: step[2] is 5, expected 0 <= step < 5"),
    (lambda p: p.step.__setitem__(0, -1), "solver_step: step[0] is -1, expected 0 <= step < 5"),
    (lambda p: set_slot(p, [0, 5, 1]), "solver_step: slot[1] is 5, expected 0 <= slot < 5"),
    (lambda p: set_slot(p, [0, 1, -2]), "solver_step: slot[2] is -2, expected 0 <= slot < 5"),
    (
        lambda p: set_slot(p, [3, 1, 3]),
        "solver_step: slot holds 3 twice, expected one row per slot",
    ),
    (lambda p: p.sizes.update(R=7), "solver_step: registers has R = 7, expected 1 to 6"),
    (lambda p: p.sizes.update(R=0), "solver_step: registers has R = 0, expected 1 to 6"),
    (lambda p: p.outputs.clear(), "solver_step: outputs has 0 branches, expected 1 to 3"),
    (lambda p: p.outputs.extend(p.outputs), "solver_step: outputs has 4 branches, expected 1 to 3"),
    (
        lambda p: p.sizes.update(dtype=3),
        "solver_step: dtype is 3, expected 0 (float32), 1 (float16)",
    ),
    (lambda p: p.sizes.update(K=0), "solver_step: table has 0 rows, expected at least 1"),
    (
        lambda p: p.sizes.update(slots=2),
        "solver_step: registers has 2 slots, expected at least the 3",
    ),
    (lambda p: p.sizes.update(D=-1), "D = -1, rows = 3, expected none below 0"),
    (share_output, "solver_step: registers overlaps outputs[1] in memory"),
    (share_input, "solver_step: model_input overlaps outputs[0] in memory"),
    (share_stats, "solver_step: stats overlaps weights in memory"),
]


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES, ids=[s for _, s in MISTAKES])
def test_refused_and_untouched(mistake: Callable[[Problem], object], sentence: str) -> None:
    problem = random_problem(1, dim=33, branches=2, slots=True, noise=True)
    mistake(problem)
    before = problem.copy()
    with pytest.raises(ValueError) as error:
        _native.solver_step(*problem.arguments())
    assert sentence in str(error.value)
    assert_same_bits(problem, before)
    for output, kept in zip(problem.outputs, before.outputs, strict=True):
        assert np.array_equal(output, kept)
    assert np.array_equal(problem.weights, before.weights)


@pytest.mark.parametrize("position", [0, 6, 8, 10, 14])
def test_a_null_address_is_refused(position: int) -> None:
    problem = random_problem(1, dim=8)
    arguments = list(problem.arguments())
    arguments[position] = 0
    with pytest.raises(ValueError, match="is null, expected an address"):
        _native.solver_step(*arguments)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="n is 0, expected at least 1"):
        _native.set_num_threads(0)
    with pytest.raises(ValueError, match="name is sse9, which this build does not have"):
        _native.set_simd("sse9")


def test_cuda_without_cuda_is_a_runtime_error() -> None:
    if _native.build_info()["cuda"].startswith("yes"):
        pytest.skip("this build has the CUDA kernels")
    problem = random_problem(1, dim=8)
    with pytest.raises(RuntimeError, match=r"this build has no CUDA kernels \(no: "):
        _native.cuda_solver_step(*problem.arguments(), 0, 0)
