"""The native fused step against a numpy transcription: values, bits, and what it may not touch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from native_problems import (
    AVAILABLE_SIMD,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT_BITS,
    STATS_RTOL,
    Problem,
    assert_same_bits,
    cast,
    on_threads,
    random_problem,
    solver_step,
)

from sidestep import _native

DIMS = (0, 1, 7, 129, 4231, 16384)
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
NAN = np.float32(np.nan)


def step(problem: Problem) -> Problem:
    """Runs the native step on a copy and returns it."""
    result = problem.copy()
    _native.solver_step(*result.arguments())
    return result


def expected_step(problem: Problem) -> Problem:
    """Runs the transcription on a copy and returns it."""
    result = problem.copy()
    solver_step(result)
    return result


def single(lines: list[list[float]], dim: int = 37, **kwargs: object) -> Problem:
    """A one-row problem with one step of the given [R+1, R+2] lines and next_scale 2."""
    problem = random_problem(7, dim=dim, registers=len(lines) - 1, rows=1, **kwargs)
    problem.table = np.array([[c for line in lines for c in line] + [2]], np.float32)
    problem.step[:] = 0
    problem.weights[:] = 1
    return problem


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_equals_transcription(dim: int, dtype: int) -> None:
    sizes = itertools.product(range(1, 7), (1, 2, 3), (False, True), (False, True))
    for seed, (registers, branches, noise, slots) in enumerate(sizes):
        problem = random_problem(
            seed,
            dim=dim,
            registers=registers,
            branches=branches,
            dtype=dtype,
            noise=noise,
            slots=slots,
            model_input=seed % 5 != 0,
        )
        got, expected = step(problem), expected_step(problem)
        assert_same_bits(got, expected, stats=False)
        np.testing.assert_allclose(got.stats, expected.stats, rtol=STATS_RTOL, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_give_the_same_bits(dtype: int) -> None:
    for seed, (dim, registers) in enumerate(itertools.product((1, 129, 9001), range(1, 7))):
        problem = random_problem(
            seed, dim=dim, registers=registers, branches=2, dtype=dtype, noise=True
        )
        results = []
        for name in AVAILABLE_SIMD:
            _native.set_simd(name)
            results.append(step(problem))
        for result in results[1:]:
            assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_the_same_bits(dtype: int) -> None:
    problem = random_problem(3, dim=300_001, registers=3, branches=2, dtype=dtype, slots=True)
    _native.set_num_threads(1)
    alone = step(problem)
    for threads in (2, 5):
        _native.set_num_threads(threads)
        assert_same_bits(step(problem), alone)


def test_a_row_does_not_depend_on_the_others() -> None:
    problem = random_problem(5, dim=5000, registers=3, branches=2, rows=4, slots=True, noise=True)
    together = step(problem)
    for row in range(4):
        one = problem.copy()
        one.weights, one.noise = problem.weights[row : row + 1], problem.noise[row : row + 1]
        one.outputs = [output[row : row + 1] for output in problem.outputs]
        one.step, one.slot = problem.step[row : row + 1], problem.slot[row : row + 1]
        one.model_input = np.zeros_like(problem.model_input[:, :1])
        one.stats = np.zeros((1, 2), np.float32)
        _native.solver_step(*one.arguments())
        slot = problem.slot[row]
        assert np.array_equal(one.registers[slot], together.registers[slot])
        assert np.array_equal(one.model_input[:, 0], together.model_input[:, row])
        assert one.stats.tobytes() == together.stats[row : row + 1].tobytes()


@pytest.mark.parametrize(("dtype", "dim"), [(FLOAT32, 1_200_000), (FLOAT16, 1_000_001)])
def test_steps_larger_than_the_caches(dtype: int, dim: int) -> None:
    problem = random_problem(11, dim=dim, registers=2, branches=3, dtype=dtype, rows=2)
    got, expected = step(problem), expected_step(problem)
    assert_same_bits(got, expected, stats=False)
    np.testing.assert_allclose(got.stats, expected.stats, rtol=STATS_RTOL, atol=0)


def test_callers_on_several_threads() -> None:
    problems = [random_problem(seed, dim=400_003, registers=2) for seed in range(3)]
    results: dict[int, Problem] = {}

    def run(index: int) -> None:
        for _ in range(3):
            results[index] = step(problems[index])

    on_threads(run, 3)
    for index, problem in enumerate(problems):
        assert_same_bits(results[index], expected_step(problem), stats=False)


@pytest.mark.parametrize("simd", AVAILABLE_SIMD)
def test_every_half_is_widened_exactly(simd: str) -> None:
    _native.set_simd(simd)
    every = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (FLOAT16, BFLOAT16):
        problem = single([[0, 1, 0], [0, 0, 0]], dim=every.size, dtype=dtype)
        problem.outputs = [every.view(np.float16 if dtype == FLOAT16 else np.uint16)[None].copy()]
        got, expected = step(problem), expected_step(problem)
        assert np.array_equal(got.registers, expected.registers, equal_nan=True)


@pytest.mark.parametrize("simd", AVAILABLE_SIMD)
def test_rounding_to_halves(simd: str) -> None:
    _native.set_simd(simd)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 17, dtype=np.uint64).astype(FLOAT_BITS)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    middle = (halves[:-1] + halves[1:]) / 2  # ties, where they are exact
    values = np.concatenate([bits.view(np.float32), halves, middle, -np.abs(middle)])
    values = values[np.abs(values) < 1e38]
    extremes = np.array([65519.99, 65520, 2**-24, 2**-25, 2**-25 * 1.0001, np.inf], np.float32)
    values = np.concatenate([values, extremes, -extremes])
    for dtype in (FLOAT16, BFLOAT16):
        problem = single([[1, 0, 0], [0, 0, 0]], dim=values.size, dtype=dtype)
        problem.table[0, -1] = 1
        problem.registers[0, 0] = values
        got = step(problem)
        assert got.model_input[0, 0].tobytes() == cast(values, dtype).tobytes()


def test_nan_survives_the_cast() -> None:
    for dtype in DTYPES:
        problem = single([[1, 0, 0], [0, 0, 0]], dtype=dtype)
        problem.registers[:] = np.array([0x7F800001, 0xFFFFFFFF], FLOAT_BITS).view(np.float32)[0]
        got = step(problem).model_input[0, 0]
        wide = got if dtype != BFLOAT16 else (got.astype(FLOAT_BITS) << 16).view(np.float32)
        assert np.isnan(wide).all()


def test_nan_that_is_not_used_does_not_spread() -> None:
    # R = 3: x' = 2x + u, register 1 = u, register 2 kept; E = x. Register 1 and 2 are not read.
    lines = [[2, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    problem = single(lines, noise=True, branches=2)
    problem.weights[:] = [[0, 3]]
    clean = step(problem)
    problem.registers[0, 1:] = NAN
    problem.noise[:] = NAN
    problem.outputs[0][:] = NAN
    got = step(problem)
    assert np.array_equal(got.registers[:, :2], clean.registers[:, :2])
    assert np.isnan(got.registers[:, 2]).all()
    assert np.array_equal(got.model_input, clean.model_input)
    assert got.stats.tobytes() == clean.stats.tobytes()
    assert np.isfinite(got.stats).all()


def test_nan_in_an_unused_latent_reaches_the_change_alone() -> None:
    problem = single([[0, 1, 0], [0, 2, 0]])
    problem.registers[:] = NAN
    got = step(problem)
    assert np.array_equal(got.registers[0, 0], problem.outputs[0][0])
    assert np.isnan(got.stats[0, 0]) and np.isfinite(got.stats[0, 1])


def test_absent_noise_counts_as_zero() -> None:
    problem = single([[1, 1, 5], [0, 0, 3]])
    problem.noise = None
    got = step(problem)
    assert np.array_equal(got.registers[0, 0], problem.registers[0, 0] + problem.outputs[0][0])
    assert got.stats[0, 1] == 0


def test_kept_registers_are_not_written() -> None:
    # A signalling NaN changes its bits when it is read, multiplied by 1 and written back.
    problem = single([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    problem.registers.view(FLOAT_BITS)[:] = 0x7F800001
    got = step(problem)
    assert (got.registers.view(FLOAT_BITS) == 0x7F800001).all()


def test_empty_lines_give_positive_zero() -> None:
    problem = single([[0, 0, 0], [0, 0, 0]])
    got = step(problem)
    assert (got.registers.view(FLOAT_BITS) == 0).all()
    assert (got.model_input.view(FLOAT_BITS) == 0).all()


def test_signed_zeros_are_kept() -> None:
    problem = single([[1, 0, 0], [0, 0, 0]])
    problem.table[0, 0] = 3
    problem.registers[:] = -0.0
    assert (step(problem).registers.view(FLOAT_BITS) == 0x80000000).all()


def test_no_rows_and_no_elements() -> None:
    problem = random_problem(0, dim=0, rows=2)
    assert step(problem).stats.tolist() == [[0, 0], [0, 0]]
    problem = random_problem(0, dim=16, rows=2)
    problem.sizes = {"rows": 0}
    assert_same_bits(step(problem), problem)
