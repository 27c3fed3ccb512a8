"""An independent numpy transcription of the parareal operators, and random problems for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from native_problems import STATS_RTOL

from sidestep import _native

NAN = np.float32(np.nan)


@dataclass
class Problem:
    """The arguments of both operators."""

    boundary: np.ndarray  # [rows, R, D] fp32
    fine: np.ndarray  # [rows, R, D] fp32
    new: np.ndarray  # [rows, R+1, D] fp32
    old: np.ndarray  # [rows, R+1, D] fp32
    coefficients: np.ndarray  # [rows, R, R+1] fp32
    residual: np.ndarray  # [rows, 2] fp32
    gram: np.ndarray  # [rows, R+1, R+1] fp32
    sizes: dict[str, int] = field(default_factory=dict)  # overrides, to lie about sizes

    def copy(self) -> Problem:
        """Returns a copy that shares no memory with this one."""
        arrays = {n: a.copy() for n, a in vars(self).items() if isinstance(a, np.ndarray)}
        return replace(self, **arrays)

    def gram_arguments(self) -> list[int]:
        """The binding's positional arguments."""
        rows, vectors, dim = self.new.shape
        sizes = {"rows": rows, "V": vectors, "D": dim} | self.sizes
        return [a.ctypes.data for a in (self.new, self.old, self.gram)] + list(sizes.values())

    def correct_arguments(self) -> list[int]:
        """The binding's positional arguments."""
        rows, registers, dim = self.boundary.shape
        sizes = {"rows": rows, "R": registers, "D": dim} | self.sizes
        read = (self.boundary, self.fine, self.new, self.old, self.coefficients, self.residual)
        return [a.ctypes.data for a in read] + list(sizes.values())

    def run(self) -> Problem:
        """Runs both native operators on a copy and returns it."""
        result = self.copy()
        _native.difference_gram(*result.gram_arguments())
        _native.parareal_correct(*result.correct_arguments())
        return result

    def written(self) -> bytes:
        """The bits of everything that is written."""
        return self.boundary.tobytes() + self.residual.tobytes() + self.gram.tobytes()


def random_problem(seed: int, *, dim: int, registers: int = 2, rows: int = 3) -> Problem:
    """A third of the elements and of the coefficients take no part."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    new = normal(rows, registers + 1, dim)
    old = normal(rows, registers + 1, dim)
    equal = rng.random(old.shape) < 0.3
    old[equal] = new[equal]
    coefficients = normal(rows, registers, registers + 1)
    coefficients[rng.random(coefficients.shape) < 0.3] = 0
    return Problem(
        boundary=normal(rows, registers, dim),
        fine=normal(rows, registers, dim),
        new=new,
        old=old,
        coefficients=coefficients,
        residual=np.full((rows, 2), NAN),
        gram=np.full((rows, registers + 1, registers + 1), NAN),
    )


def expected_boundary(problem: Problem) -> np.ndarray:
    """fine + (sum_j c_j d_j), one fp32 multiplication and one fp32 addition per term."""
    d = problem.new - problem.old
    correction = np.full(problem.fine.shape, -0.0, np.float32)
    for j in range(d.shape[1]):
        c = problem.coefficients[:, :, j, None]
        d_j = d[:, j, None]
        correction = np.where((c != 0) & (d_j != 0), correction + c * d_j, correction)
    return problem.fine + correction


def assert_equals_transcription(got: Problem, problem: Problem) -> None:
    """Asserts that `got` is what both operators make of `problem`."""
    rows, _, dim = problem.boundary.shape
    expected = expected_boundary(problem)
    assert got.boundary.tobytes() == expected.tobytes()
    x, before = expected[:, 0].astype(float), problem.boundary[:, 0]
    means = [(expected[:, 0] - before).astype(float) ** 2, x**2]
    means = [m.mean(-1) if dim else np.zeros(rows) for m in means]
    np.testing.assert_allclose(got.residual, np.stack(means, 1), rtol=STATS_RTOL, atol=0)
    d = (problem.new - problem.old).astype(float)
    gram = d @ d.transpose(0, 2, 1)
    lengths = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    allowed = STATS_RTOL * lengths[:, :, None] * lengths[:, None]
    assert (np.abs(got.gram - gram) <= allowed).all()
