"""The CUDA kernels' own sources on the CPU, under sanitizers, against the numpy transcriptions.

What the sanitizers would find is planted in kernels of the tests (cuda_shim/planted.cu).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import cuda_calls
import native_parareal_problems as parareal
import native_problems as steps
import numpy as np
import pytest
import torch
from cuda_calls import Programs, compact_call, decide_call, parareal_calls, replay, run, step_call

from sidestep.kernels import reference

DTYPES = (steps.FLOAT32, steps.FLOAT16, steps.BFLOAT16)
# One chunk of 2048 elements and several; 16-byte accesses (2056) and single elements.
DIMS = (0, 1, 129, 2056, 4231)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Programs]:
    """The kernels and the planted ones under each sanitizer."""
    plain = cuda_calls.build_plain(tmp_path_factory.mktemp("plain"), cuda_calls.PLAIN)
    return {
        sanitizer: cuda_calls.build(plain, tmp_path_factory.mktemp("sanitized"), sanitizer)
        for sanitizer in cuda_calls.SANITIZERS
    }


@pytest.fixture(params=cuda_calls.SANITIZERS)
def programs(request: pytest.FixtureRequest, builds: dict[str, Programs]) -> Programs:
    """Those of one sanitizer after the other."""
    return builds[request.param]


def test_solver_step_equals_transcription(programs: Programs, tmp_path: Path) -> None:
    problems = []
    for seed, (registers, dtype) in enumerate(itertools.product(range(1, 7), DTYPES)):
        for dim in (DIMS[seed % len(DIMS)], DIMS[(seed + 3) % len(DIMS)]):
            problems.append(
                steps.random_problem(
                    seed,
                    dim=dim,
                    registers=registers,
                    branches=1 + seed % 3,
                    dtype=dtype,
                    noise=seed % 2 == 0,
                    slots=seed // 2 % 2 == 0,
                    model_input=seed % 5 != 0,
                    rows=2,
                )
            )
    results = [problem.copy() for problem in problems]
    replay(programs, [step_call(p, seed % 4 == 3) for seed, p in enumerate(results)], tmp_path)
    for problem, got in zip(problems, results, strict=True):
        steps.solver_step(problem)
        steps.assert_same_bits(got, problem, stats=False)
        np.testing.assert_allclose(got.stats, problem.stats, rtol=steps.STATS_RTOL, atol=0)


def test_parareal_equals_transcription(programs: Programs, tmp_path: Path) -> None:
    problems = []
    for registers, i in itertools.product(range(1, 7), (0, 2)):
        dim = DIMS[(registers + i) % len(DIMS)]
        problems.append(parareal.random_problem(i, dim=dim, registers=registers, rows=2))
    results = [problem.copy() for problem in problems]
    calls = [parareal_calls(p, seed % 4 == 3) for seed, p in enumerate(results)]
    # V = 1 has no correction: the gram of the model's output alone.
    single = parareal.random_problem(9, dim=129, registers=1)
    new, old = (np.ascontiguousarray(a[:, :1]) for a in (single.new, single.old))
    gram = np.full((3, 1, 1), np.nan, np.float32)
    alone = cuda_calls.Call(1, (3, 1, 129), [gram], [new, old])
    replay(programs, [*itertools.chain(*calls), alone], tmp_path)
    for problem, got in zip(problems, results, strict=True):
        parareal.assert_equals_transcription(got, problem)
    expected = ((new - old).astype(float) ** 2).sum(-1)
    np.testing.assert_allclose(gram[..., 0], expected, rtol=steps.STATS_RTOL)


def test_exit_decide_equals_reference(programs: Programs, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    calls = []
    for n, kind in itertools.product((0, 1, 2, 33, 256, 257, 1100), ("alone", "pairs", "any")):
        score, limit = rng.random((2, n), dtype=np.float32)
        score[::7] = np.nan  # stays
        pairs = np.arange(n) % max(n // 2, 1)
        group = {"alone": None, "pairs": pairs, "any": rng.integers(0, max(n, 1), n)}[kind]
        calls.append(decide_call(score, limit, group, n % 2 == 1))
    none, all_of_them = np.full(40, 2, np.float32), np.zeros(40, np.float32)
    calls += [decide_call(score, all_of_them + 1, None) for score in (none, all_of_them)]
    replay(programs, calls, tmp_path)
    for call in calls:
        tensors = [None if array is None else torch.from_numpy(array) for array in call.read]
        expected = reference.exit_decide(*tensors)
        for got, wanted in zip(call.written, expected, strict=True):
            assert np.array_equal(got, wanted.numpy())


def test_exit_compact_equals_reference(programs: Programs, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    calls, expected = [], []
    # Single elements of either size, 16 bytes at a time, several blocks a row, and nothing.
    shapes = ((1,), (3, 43), (2, 4096), (4231,), (5, 0), ())
    for shape, dtype, n in itertools.product(shapes, (np.float32, np.float16), (0, 1, 6, 9)):
        hidden, out = (rng.standard_normal((m, *shape)).astype(dtype) for m in (n, n + 2))
        score, limit = torch.rand(2, n, generator=torch.Generator().manual_seed(n))
        order, kept = reference.exit_decide(score, limit)
        place = rng.permutation(n + 2)[:n]
        tensors = [torch.from_numpy(array.copy()) for array in (hidden, out)]
        reference.exit_compact_(*tensors, order, kept, torch.from_numpy(place))
        expected.append((*tensors, int(kept), hidden.copy()))
        calls.append(compact_call(hidden, out, order.numpy(), int(kept), place, n == 9))
    replay(programs, calls, tmp_path)
    for call, (hidden, out, kept, before) in zip(calls, expected, strict=True):
        assert call.written[0][:kept].tobytes() == hidden[:kept].numpy().tobytes()
        assert call.written[0][kept:].tobytes() == before[kept:].tobytes()
        assert call.written[1].tobytes() == out.numpy().tobytes()


def test_exit_rows_out_of_range_are_not_moved(programs: Programs, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    score, limit = np.zeros(6, np.float32), np.ones(6, np.float32)
    decide = decide_call(score, limit, np.array([0, 1, -1, 3, 6, 2**40]))
    hidden = rng.integers(0, 256, (6, 131), dtype=np.uint8)  # bytes one by one
    out = rng.integers(0, 256, (4, 131), dtype=np.uint8)
    before = hidden.copy(), out.copy()
    # Rows 1, 2, 9 and 4 leave; 2 has no place, 1 is filled by 5, 4 is no hole.
    order, place = np.array([0, 5, 1, 2, 9, 4]), np.array([-1, 3, 4, -1, 0, -1])
    compact = compact_call(hidden, out, order, 2, place)
    # Everything that a kernel reads of rows is NaN's own bytes, or numbers far from any array.
    far = compact_call(hidden.copy(), out.copy(), np.full(6, 2**62), -(2**62), np.full(6, -(2**62)))
    replay(programs, [decide, compact, far], tmp_path)
    assert decide.written[0].tolist() == [4, 5, 2, 0, 1, 3]
    assert decide.written[1].tolist() == [3]
    expected_hidden, expected_out = before[0].copy(), before[1].copy()
    expected_hidden[1] = before[0][5]
    expected_out[3], expected_out[0] = before[0][1], before[0][4]
    assert np.array_equal(compact.written[0], expected_hidden)
    assert np.array_equal(compact.written[1], expected_out)
    assert np.array_equal(far.written[0], before[0]) and np.array_equal(far.written[1], before[1])


def test_a_row_does_not_depend_on_the_others(programs: Programs, tmp_path: Path) -> None:
    together = steps.random_problem(5, dim=2056, registers=3, branches=2, rows=3, noise=True)
    alone = []
    for row in range(3):
        problem = together.copy()
        for name in ("registers", "weights", "noise", "step", "stats"):
            setattr(problem, name, getattr(together, name)[row : row + 1].copy())
        problem.outputs = [output[row : row + 1].copy() for output in together.outputs]
        problem.model_input = together.model_input[:, row : row + 1].copy()
        alone.append(problem)
    replay(programs, [step_call(problem) for problem in (together, *alone)], tmp_path)
    for row, problem in enumerate(alone):
        assert problem.registers.tobytes() == together.registers[row].tobytes()
        assert problem.stats.tobytes() == together.stats[row].tobytes()


def test_a_row_out_of_range_is_left_alone(programs: Programs, tmp_path: Path) -> None:
    problem = steps.random_problem(3, dim=129, rows=4, slots=True)
    problem.step[1], problem.slot[2] = problem.table.shape[0], -1
    got = problem.copy()
    replay(programs, [step_call(got)], tmp_path)
    assert np.isnan(got.stats[1:3]).all() and np.isfinite(got.stats[[0, 3]]).all()
    left = [slot for slot in range(6) if slot not in problem.slot[[0, 3]]]
    assert got.registers[left].tobytes() == problem.registers[left].tobytes()
    assert not got.model_input[:, 1:3].any() and got.model_input[:, [0, 3]].any()


def test_captured_calls_equal_eager_ones(programs: Programs, tmp_path: Path) -> None:
    results = []
    for mode in ((), ("graph",)):
        problem = steps.random_problem(1, dim=2056, registers=3, branches=2, dtype=steps.FLOAT16)
        blocks = [parareal.random_problem(2, dim=dim) for dim in (0, 2056)]
        score, limit, hidden, out = np.random.default_rng(3).random((4, 5), dtype=np.float32)
        order, place = np.array([0, 4, 2, 1, 3]), np.arange(5)
        exits = [decide_call(score, limit, None), compact_call(hidden, out, order, 3, place)]
        calls = [step_call(problem), *itertools.chain(*map(parareal_calls, blocks)), *exits]
        replay(programs, calls, tmp_path, *mode)
        written = (array for call in calls for array in call.written)
        results.append([array.tobytes() for array in written if array is not None])
    assert results[0] == results[1]


INDICES = list(range(64))
RIGHT = {
    "reverse": (INDICES[::-1], 0),
    "rotate": (INDICES[-1:] + INDICES[:-1], 0),
    "sum": ([496] * 32 + [1520] * 32, 0),
    "count": (INDICES, 5 * 64),
    "capture": (INDICES, 2 * 5 * 64),
    "ones": ([1] * 64, 0),
    "last-block": ([10, 0, 1, 2, 3, 4, *INDICES[6:]], 0),
}


@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels_run_clean(programs: Programs, kernel: str) -> None:
    done = run(programs.planted, kernel)
    assert (done.returncode, done.stderr) == (0, "")
    x, count = RIGHT[kernel]
    assert [int(value) for value in done.stdout.split()] == [*x, count]


# What finds each planted fault, the start of its report, and the line of the fault.
RACE = ("thread", "ThreadSanitizer: data race")
BOUNDS = ("address,undefined", "AddressSanitizer: ")
PLANTED = {
    "reverse": (*RACE, "x[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];"),
    "count": (*RACE, "*count += of_block;"),
    "last-block": (*RACE, "*total += sums[b];"),
    "ones": (*BOUNDS, "x[i] = 1.0f;"),
    "rotate": (*BOUNDS, "to[Planted ? place : place % kThreads] = x[threadIdx.x];"),
}


@pytest.mark.parametrize("kernel", PLANTED)
def test_planted_faults_are_reported(builds: dict[str, Programs], kernel: str) -> None:
    sanitizer, report, line = PLANTED[kernel]
    done = run(builds[sanitizer].planted, kernel, "wrong")
    assert done.returncode == 66, done.stderr
    source = (cuda_calls.SHIM / "planted.cu").read_text().splitlines()
    number = 1 + next(i for i, text in enumerate(source) if line in text)
    assert report in done.stderr
    assert f"planted.cu:{number}" in done.stderr


def test_what_the_shim_itself_refuses(programs: Programs) -> None:
    done = run(programs.planted, "sum", "wrong")
    assert done.returncode < 0
    assert "cuda_shim: threads of a block wait at a barrier and others at a shuffle" in done.stderr
    # Nothing of a failed capture has run, or will.
    previous = "operation failed due to a previous error during capture"
    for kernel, reason in (("block", "invalid configuration argument"), ("capture", previous)):
        done = run(programs.planted, kernel, "wrong")
        assert done.returncode == 2
        assert done.stderr.strip() == f"{kernel}: CUDA refused the launch: {reason}"
        assert [int(value) for value in done.stdout.split()] == [*INDICES, 0]
