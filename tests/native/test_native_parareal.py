"""The native parareal operators against a numpy transcription: values, bits and refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from native_parareal_problems import (
    Problem,
    assert_equals_transcription,
    expected_boundary,
    random_problem,
)
from native_problems import AVAILABLE_SIMD, on_threads

from sidestep import _native

DIMS = (0, 1, 7, 16, 129, 4231)
NAN = np.float32(np.nan)


@pytest.mark.parametrize("dim", DIMS)
def test_equals_transcription(dim: int) -> None:
    for registers in range(1, 7):
        problem = random_problem(registers, dim=dim, registers=registers)
        assert_equals_transcription(problem.run(), problem)


def test_instruction_sets_give_the_same_bits() -> None:
    for seed, (dim, registers) in enumerate(itertools.product((1, 129, 9001), range(1, 7))):
        problem = random_problem(seed, dim=dim, registers=registers)
        results = set()
        for name in AVAILABLE_SIMD:
            _native.set_simd(name)
            results.add(problem.run().written())
        assert len(results) == 1


def test_threads_give_the_same_bits() -> None:
    problem = random_problem(3, dim=300_001, registers=2)
    results = set()
    for threads in (1, 2, 5):
        _native.set_num_threads(threads)
        results.add(problem.run().written())
    assert len(results) == 1


def test_callers_on_several_threads() -> None:
    problems = [random_problem(seed, dim=200_003 + seed) for seed in range(3)]
    results: dict[int, Problem] = {}

    def run(index: int) -> None:
        for _ in range(3):
            results[index] = problems[index].run()

    on_threads(run, 3)
    for index, problem in enumerate(problems):
        assert results[index].boundary.tobytes() == expected_boundary(problem).tobytes()
        assert results[index].written() == problem.run().written()


@pytest.mark.parametrize("simd", ["best", "scalar"])
def test_nan_that_is_not_used_does_not_spread(simd: str) -> None:
    if simd != "best":
        _native.set_simd(simd)
    problem = random_problem(1, dim=133)
    problem.coefficients[:, :, 1] = 0
    clean = problem.run()
    problem.new[:, 1] = NAN
    problem.boundary[:, 1] = NAN
    got = problem.run()
    assert got.boundary.tobytes() == clean.boundary.tobytes()
    assert got.residual.tobytes() == clean.residual.tobytes()


@pytest.mark.parametrize("simd", ["best", "scalar"])
@pytest.mark.parametrize("coefficient", [1, -1, np.inf, np.nan])
def test_equal_inputs_give_fine(simd: str, coefficient: float) -> None:
    if simd != "best":
        _native.set_simd(simd)
    problem = random_problem(1, dim=133)
    problem.new[:, :, ::7] = np.inf
    problem.new[:, :, 1::7] = -0.0
    problem.old = problem.new.copy()
    problem.old[:, :, 1::7] = 0.0
    problem.fine[:, :, ::5] = -0.0
    problem.coefficients[:] = coefficient
    got = problem.run()
    assert got.boundary.tobytes() == problem.fine.tobytes()
    assert got.gram.tobytes() == bytes(got.gram.nbytes)


def test_no_rows_and_no_elements() -> None:
    assert random_problem(0, dim=0).run().residual.tolist() == [[0, 0]] * 3
    assert not random_problem(0, dim=0).run().gram.any()
    problem = random_problem(0, dim=16)
    problem.sizes = {"rows": 0}
    assert problem.run().written() == problem.written()


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"R": 0}, "parareal_correct_: boundary has R = 0, expected 1 to 6"),
        ({"R": 7}, "parareal_correct_: boundary has R = 7, expected 1 to 6"),
        ({"D": -1}, "parareal_correct_: rows = 3, D = -1, expected none below 0"),
        ({"V": 0}, "difference_gram: new has V = 0, expected 1 to 7"),
        ({"V": 8}, "difference_gram: new has V = 8, expected 1 to 7"),
        ({"V": 3, "rows": -2}, "difference_gram: rows = -2, D = 33, expected none below 0"),
    ],
)
def test_wrong_sizes_are_refused(sizes: dict[str, int], sentence: str) -> None:
    problem = random_problem(1, dim=33)
    problem.sizes = sizes
    before = problem.written()
    with pytest.raises(ValueError) as error:
        if "V" in sizes:
            _native.difference_gram(*problem.gram_arguments())
        else:
            _native.parareal_correct(*problem.correct_arguments())
    assert str(error.value) == sentence
    assert problem.written() == before


@pytest.mark.parametrize("name", ["fine", "new", "old", "coefficients", "residual"])
def test_overlaps_are_refused(name: str) -> None:
    problem = random_problem(1, dim=33)
    shape = getattr(problem, name).shape
    memory = np.zeros(2000, np.float32)
    problem.boundary = memory[:198].reshape(3, 2, 33)
    setattr(problem, name, memory[190 : 190 + np.prod(shape)].reshape(shape))
    with pytest.raises(ValueError) as error:
        _native.parareal_correct(*problem.correct_arguments())
    assert str(error.value) == (
        f"parareal_correct_: boundary overlaps {name} in memory, expected separate tensors"
    )
    assert not memory.any()


def test_null_addresses_are_refused() -> None:
    problem = random_problem(1, dim=8)
    for run, arguments, tensors in (
        (_native.difference_gram, problem.gram_arguments(), 3),
        (_native.parareal_correct, problem.correct_arguments(), 6),
    ):
        for position in range(tensors):
            wrong = list(arguments)
            wrong[position] = 0
            with pytest.raises(ValueError, match="is null, expected an address"):
                run(*wrong)


def test_cuda_workspaces() -> None:
    """Sums of every pair, or two means, of every chunk of 2048 elements, in fp32."""
    assert _native.cuda_difference_gram_workspace(3, 4097, 7) == 3 * 3 * 28 * 4
    assert _native.cuda_parareal_correct_workspace(3, 4097) == 3 * 3 * 2 * 4
    assert _native.cuda_parareal_correct_workspace(3, 0) == 0


def test_cuda_without_cuda_is_a_runtime_error() -> None:
    if _native.build_info()["cuda"].startswith("yes"):
        pytest.skip("this build has the CUDA kernels")
    problem = random_problem(1, dim=8)
    with pytest.raises(RuntimeError, match=r"difference_gram: this build has no CUDA kernels \(no"):
        _native.cuda_difference_gram(*problem.gram_arguments(), 0, 0)
    with pytest.raises(RuntimeError, match=r"parareal_correct_: this build has no CUDA kernels"):
        _native.cuda_parareal_correct(*problem.correct_arguments(), 0, 0)
