"""The native exit operators against a numpy transcription: values, bits and refusals."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from native_problems import AVAILABLE_SIMD, BFLOAT16, FLOAT16, FLOAT32, cast, on_threads, widen

from sidestep import _native

# A logit of size 1: fp32 products in sums of 64, rounded like a random walk, then float64.
ATOL = 1e-6
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)


@dataclass
class Problem:
    """The arguments of the exit score."""

    hidden: np.ndarray  # [rows, N, D] of dtype
    probe: np.ndarray  # [k, D] fp32
    bias: np.ndarray  # [rows, k] fp32
    score: np.ndarray  # [rows, k] fp32
    dtype: int = FLOAT32
    normalize: bool = True
    sigmoid: bool = True
    eps: float = 1e-6
    sizes: dict[str, int] = field(default_factory=dict)  # overrides, to lie about sizes

    def arguments(self) -> list[float]:
        """The binding's positional arguments."""
        rows, tokens, dim = self.hidden.shape
        strides = [stride // self.hidden.itemsize for stride in self.hidden.strides[:2]]
        names = ("rows", "N", "D", "row_stride", "token_stride", "k", "dtype")
        sizes = (rows, tokens, dim, *strides, len(self.probe), self.dtype)
        arrays = (self.hidden, self.probe, self.bias, self.score)
        numbers = dict(zip(names, sizes, strict=True)) | self.sizes
        addresses = [array.ctypes.data for array in arrays]
        return [*addresses, *numbers.values(), self.normalize, self.sigmoid, self.eps]

    def run(self) -> np.ndarray:
        """Runs the operator, and returns a new score."""
        result = replace(self, score=np.full_like(self.score, np.nan))
        _native.exit_score(*result.arguments())
        return result.score

    def expected(self) -> np.ndarray:
        """The formula in float64."""
        h = widen(self.hidden, self.dtype).astype(float)
        if self.normalize:
            h = h - h.mean(-1, keepdims=True)
            h = h / np.sqrt((h**2).mean(-1, keepdims=True) + self.eps)
        z = np.einsum("bnd,kd->bnk", h, self.probe) + self.bias[:, None]
        return (1 / (1 + np.exp(-z)) if self.sigmoid else z).mean(1)


def random_problem(
    seed: int, *, dim: int, tokens: int = 70, probes: int = 3, rows: int = 3, dtype: int = FLOAT32
) -> Problem:
    """Logits of size 1; rows and tokens lie amid others, which are NaN."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    memory = cast(np.full((rows, tokens + 2, dim + 3), np.nan, np.float32), dtype)
    hidden = memory[:, 1 : 1 + tokens, :dim]
    hidden[:] = cast(0.3 + normal(rows, tokens, dim), dtype)
    probe = normal(probes, dim) / np.float32(dim**0.5)
    return Problem(hidden, probe, normal(rows, probes), normal(rows, probes), dtype)


@pytest.mark.parametrize("simd", AVAILABLE_SIMD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_is_the_formula(simd: str, dtype: int) -> None:
    _native.set_simd(simd)
    for seed, (dim, probes) in enumerate(itertools.product((1, 7, 129, 2500), (1, 4, 6))):
        problem = random_problem(seed, dim=dim, probes=probes, dtype=dtype)
        for normalize, sigmoid in itertools.product((False, True), repeat=2):
            problem = replace(problem, normalize=normalize, sigmoid=sigmoid)
            np.testing.assert_allclose(problem.run(), problem.expected(), rtol=0, atol=ATOL)


def test_instruction_sets_give_the_same_bits() -> None:
    for seed, (dim, dtype) in enumerate(itertools.product((1, 129, 1300), DTYPES)):
        problem = random_problem(seed, dim=dim, probes=5, dtype=dtype)
        results = set()
        for name in AVAILABLE_SIMD:
            _native.set_simd(name)
            results.add(problem.run().tobytes())
        assert len(results) == 1


def test_threads_and_rows_give_the_same_bits() -> None:
    problem = random_problem(3, dim=1024, tokens=300, rows=4)
    results = set()
    for threads in (1, 2, 5):
        _native.set_num_threads(threads)
        results.add(problem.run().tobytes())
    assert len(results) == 1
    for row in range(4):
        part = slice(row, row + 1)
        alone = replace(
            problem, hidden=problem.hidden[part], bias=problem.bias[part], score=problem.score[part]
        )
        assert alone.run().tobytes() == problem.run()[part].tobytes()


def test_callers_on_several_threads() -> None:
    problems = [random_problem(seed, dim=1024, tokens=200 + seed) for seed in range(3)]
    results: dict[int, np.ndarray] = {}

    def run(index: int) -> None:
        for _ in range(3):
            results[index] = problems[index].run()

    on_threads(run, 3)
    for index, problem in enumerate(problems):
        assert results[index].tobytes() == problem.run().tobytes()


def test_no_rows_and_no_tokens() -> None:
    assert random_problem(0, dim=16, tokens=0).run().tolist() == [[0, 0, 0]] * 3
    problem = random_problem(0, dim=16)
    problem.sizes = {"rows": 0}
    assert np.isnan(problem.run()).all()  # nothing is written


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"dtype": 3}, "hidden has dtype 3, expected a sidestep_dtype"),
        (
            {"D": 0},
            "rows = 3, N = 70, D = 0, k = 3, expected rows and N not below 0 and D and k at "
            "least 1",
        ),
        (
            {"N": -1},
            "rows = 3, N = -1, D = 33, k = 3, expected rows and N not below 0 and D and k at "
            "least 1",
        ),
        ({"row_stride": -36}, "hidden has strides [-36, 36, 1], expected none below 0"),
    ],
)
def test_wrong_sizes_are_refused(sizes: dict[str, int], sentence: str) -> None:
    problem = random_problem(1, dim=33)
    problem.sizes = sizes
    before = problem.score.tobytes()
    with pytest.raises(ValueError) as error:
        _native.exit_score(*problem.arguments())
    assert str(error.value) == f"exit_score: {sentence}"
    assert problem.score.tobytes() == before


def decide(score: np.ndarray, limit: np.ndarray, group: np.ndarray | None) -> tuple[list[int], int]:
    """order and kept."""
    order, kept = np.full(len(score), -1), np.full(1, -1)
    group_at = 0 if group is None else group.ctypes.data
    arrays = [score.ctypes.data, limit.ctypes.data, group_at, order.ctypes.data, kept.ctypes.data]
    _native.exit_decide(*arrays, len(score))
    return order.tolist(), int(kept[0])


def test_decisions_are_the_definition() -> None:
    rng = np.random.default_rng(0)
    for n, grouped in itertools.product((0, 1, 2, 5, 33), (False, True)):
        score, limit = rng.random((2, n), dtype=np.float32)
        group = rng.integers(0, n, n) if grouped and n else None
        order, kept = decide(score, limit, group)
        numbers = np.arange(n) if group is None else group
        leaves = [all((score <= limit)[numbers == g]) for g in numbers]
        assert order[kept:] == [r for r in range(n) if leaves[r]]
        assert all(order[r] == r for r in range(kept) if not leaves[r])
        tail = [r for r in range(kept, n) if not leaves[r]]
        assert [order[r] for r in range(kept) if leaves[r]] == tail


@dataclass
class Moves:
    """The arguments of the moves: rows 1, 2 and 4 of 6 leave."""

    hidden: np.ndarray  # [6, bytes]
    out: np.ndarray  # [9, bytes]
    order: np.ndarray  # [6]
    kept: np.ndarray  # [1]
    place: np.ndarray  # [6]

    def arguments(self) -> list[int]:
        """The binding's positional arguments."""
        arrays = (self.hidden, self.out, self.order, self.kept, self.place)
        sizes = (len(self.order), len(self.out), self.hidden.shape[1])
        return [*[array.ctypes.data for array in arrays], *sizes]


def moves(row_bytes: int) -> Moves:
    """Random bytes."""
    rng = np.random.default_rng(row_bytes)
    memory = rng.integers(0, 256, (15, row_bytes), dtype=np.uint8)
    order, place = np.array([0, 3, 5, 1, 2, 4]), np.array([-1, 8, 0, -1, 3, 99])
    return Moves(memory[:6].copy(), memory[6:].copy(), order, np.array([3]), place)


@pytest.mark.parametrize("row_bytes", [0, 1, 70, 200_003, 1_500_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_moves(row_bytes: int, threads: int) -> None:
    """From 2 MB on over threads, in pieces of 64 KB."""
    _native.set_num_threads(threads)
    given = moves(row_bytes)
    hidden, out = given.hidden.copy(), given.out.copy()
    _native.exit_compact(*given.arguments())
    out[[8, 0, 3]] = hidden[[1, 2, 4]]
    assert np.array_equal(given.hidden[:3], hidden[[0, 3, 5]])
    assert np.array_equal(given.out, out)


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("kept", [9], "kept is 9, expected 0 <= kept <= 6"),
        ("order", [0, 3, 5, 1, 2, -1], "order[5] is -1, expected 0 <= order < 6"),
        ("order", [0, 3, 3, 1, 2, 4], "order holds 3 twice, expected every one once"),
        ("order", [0, 3, 1, 5, 2, 4], "order[2] is 1, expected 2 or one from kept = 3 on"),
        ("place", [0, 9, 1, 2, 3, 4], "place[1] is 9, expected 0 <= place < 9"),
        ("place", [0, 3, 1, 2, 3, 4], "place holds 3 twice, expected every one once"),
    ],
)
def test_wrong_moves_are_refused(name: str, values: list[int], sentence: str) -> None:
    given = moves(70)
    getattr(given, name)[:] = values
    before = given.hidden.tobytes() + given.out.tobytes()
    with pytest.raises(ValueError) as error:
        _native.exit_compact(*given.arguments())
    assert str(error.value) == f"exit_compact_: {sentence}"
    assert given.hidden.tobytes() + given.out.tobytes() == before


def test_overlaps_and_null_addresses_are_refused() -> None:
    problem, given = random_problem(1, dim=8), moves(64)
    for run, arguments, tensors in (
        (_native.exit_score, problem.arguments(), 4),
        (_native.exit_compact, given.arguments(), 5),
    ):
        for position in range(tensors):
            wrong = list(arguments)
            wrong[position] = 0
            with pytest.raises(ValueError, match="is null, expected an address"):
                run(*wrong)
    problem.score = problem.bias[1:]
    with pytest.raises(ValueError, match="score overlaps bias in memory, expected separate"):
        _native.exit_score(*problem.arguments())
    given.out = given.hidden[3:]
    with pytest.raises(ValueError, match="hidden overlaps out in memory, expected separate"):
        _native.exit_compact(*given.arguments())
