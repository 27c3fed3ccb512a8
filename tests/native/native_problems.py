"""An independent numpy transcription of the fused step, and random problems for it.

Written from the contract (docs/plans.md), not from the C++: whole rows at a time, one fp32
multiplication and one fp32 addition per live term. Other tests of the library use parts of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sidestep import _native

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
FLOAT_BITS = np.uint32

# Means of D terms of one sign: the library adds 64 fp32 terms per lane and the rest in float64.
STATS_RTOL = 1e-6

# The instruction sets of this processor, best first, whatever a test has chosen since.
_SIMD = ["avx512", "avx2", "scalar"]
AVAILABLE_SIMD = _SIMD[_SIMD.index(_native.simd()) :]


def on_threads(work: Callable[[int], None], count: int) -> None:
    """Calls work(0) to work(count - 1), each on a thread of its own, and waits for all."""
    callers = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds fp32 of any shape to bfloat16 bits (uint16), to nearest even, NaN kept."""
    bits = np.ascontiguousarray(values, np.float32).view(FLOAT_BITS).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Widens bfloat16 bits of any shape to fp32."""
    return (bits.astype(FLOAT_BITS) << 16).view(np.float32)


def cast(values: np.ndarray, dtype: int) -> np.ndarray:
    """Casts fp32 to the model's dtype; bfloat16 as its bits."""
    if dtype == FLOAT32:
        return values.astype(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float16) if dtype == FLOAT16 else to_bfloat16(values)


def widen(values: np.ndarray, dtype: int) -> np.ndarray:
    """Undoes `cast`, exactly."""
    return from_bfloat16(values) if dtype == BFLOAT16 else values.astype(np.float32)


@dataclass
class Problem:
    """The arguments of one call; see the contract for their meaning."""

    registers: np.ndarray  # [slots, R, D] fp32
    outputs: list[np.ndarray]  # G of [rows, D] in the model's dtype
    weights: np.ndarray  # [rows, G] fp32
    noise: np.ndarray | None  # [rows, D] fp32
    table: np.ndarray  # [K, (R+1)*(R+2)+1] fp32
    step: np.ndarray  # [rows] int64
    slot: np.ndarray | None  # [rows] int64
    model_input: np.ndarray | None  # [G, rows, D] in the model's dtype
    stats: np.ndarray  # [rows, 2] fp32
    dtype: int = FLOAT32
    sizes: dict[str, int] = field(default_factory=dict)  # overrides, to lie about sizes

    def arguments(self) -> tuple:
        """Returns the binding's positional arguments."""
        slots, registers, dim = self.registers.shape
        values = {
            "slots": slots,
            "R": registers,
            "D": dim,
            "dtype": self.dtype,
            "K": self.table.shape[0],
            "rows": self.step.shape[0],
        } | self.sizes
        return (
            self.registers.ctypes.data,
            values["slots"],
            values["R"],
            values["D"],
            tuple(output.ctypes.data for output in self.outputs),
            values["dtype"],
            self.weights.ctypes.data,
            address(self.noise),
            self.table.ctypes.data,
            values["K"],
            self.step.ctypes.data,
            address(self.slot),
            values["rows"],
            address(self.model_input),
            self.stats.ctypes.data,
        )

    def copy(self) -> Problem:
        """Returns the same problem in memory of its own."""
        arrays = {
            name: None if value is None else value.copy()
            for name, value in vars(self).items()
            if name not in ("outputs", "dtype", "sizes")
        }
        outputs = [output.copy() for output in self.outputs]
        return Problem(**arrays, outputs=outputs, dtype=self.dtype, sizes=dict(self.sizes))


def assert_same_bits(got: Problem, expected: Problem, *, stats: bool = True) -> None:
    """Asserts that everything the step writes has the same bits (`stats` on request)."""
    assert np.array_equal(got.registers.view(FLOAT_BITS), expected.registers.view(FLOAT_BITS))
    if got.model_input is not None:
        assert got.model_input.tobytes() == expected.model_input.tobytes()
    if stats:
        assert got.stats.tobytes() == expected.stats.tobytes()


def address(array: np.ndarray | None) -> int:
    """Returns where an array's data lies; 0 for None."""
    return 0 if array is None else array.ctypes.data


def line(coefficients: np.ndarray, columns: list[np.ndarray | None], dim: int) -> np.ndarray:
    """Returns sum_j c[j] * column[j] over the non-zero c in order; shape [D]."""
    total = None
    for c, column in zip(coefficients, columns, strict=True):
        if c == 0 or column is None:
            continue
        product = np.float32(c) * column
        total = product if total is None else total + product
    return np.zeros(dim, np.float32) if total is None else total


@np.errstate(over="ignore", invalid="ignore")
def solver_step(problem: Problem) -> None:
    """Performs the fused step in place on `problem`."""
    _, num_registers, dim = problem.registers.shape
    for row, k in enumerate(problem.step):
        state = problem.registers[row if problem.slot is None else problem.slot[row]]  # [R, D]
        matrix = problem.table[k, :-1].reshape(num_registers + 1, num_registers + 2)
        branches = [widen(output[row], problem.dtype) for output in problem.outputs]
        u = line(problem.weights[row], branches, dim)
        noise = None if problem.noise is None else problem.noise[row]
        columns = [*state.copy(), u, noise]
        new = [line(coefficients, columns, dim) for coefficients in matrix]
        for i in range(num_registers):
            state[i] = new[i]
        change = np.abs(new[0] - columns[0]).astype(np.float64)
        error = np.abs(new[-1]).astype(np.float64)
        problem.stats[row] = (change.mean(), error.mean()) if dim else (0, 0)
        if problem.model_input is not None:
            scaled = new[0] * problem.table[k, -1]
            problem.model_input[:, row] = cast(scaled, problem.dtype)


def random_problem(
    seed: int,
    *,
    dim: int,
    registers: int = 2,
    branches: int = 1,
    dtype: int = FLOAT32,
    noise: bool = False,
    slots: bool = False,
    model_input: bool = True,
    rows: int = 3,
    density: float = 0.7,
) -> Problem:
    """Draws a problem whose lines mix zero, unit and general coefficients."""
    rng = np.random.default_rng(seed)
    steps = 5

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    lines = normal(steps, registers + 1, registers + 2)
    lines *= rng.random(lines.shape) < density
    lines[0, :registers] = np.eye(registers, registers + 2)  # every register kept
    if registers > 1:  # a history that shifts by one place
        lines[1, 1:registers] = np.eye(registers - 1, registers + 2)
    table = np.concatenate(
        [lines.reshape(steps, -1), rng.uniform(0.5, 2, (steps, 1))], axis=1
    ).astype(np.float32)
    weights = normal(rows, branches)
    weights[0, rng.integers(branches)] = 0
    slot_count = rows + 2 if slots else rows
    element = np.float16 if dtype == FLOAT16 else np.uint16 if dtype == BFLOAT16 else np.float32
    return Problem(
        registers=normal(slot_count, registers, dim),
        outputs=[cast(normal(rows, dim), dtype) for _ in range(branches)],
        weights=weights,
        noise=normal(rows, dim) if noise else None,
        table=table,
        step=rng.integers(0, steps, rows).astype(np.int64),
        slot=rng.permutation(slot_count)[:rows].astype(np.int64) if slots else None,
        model_input=np.zeros((branches, rows, dim), element) if model_input else None,
        stats=np.full((rows, 2), np.nan, np.float32),
        dtype=dtype,
    )
