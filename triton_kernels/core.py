"""The parts of the native library that hold numbers only: the row scheduler of the engine, and the
dependency schedule of SRDS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sidestep.kernels.errors import BackendUnavailable

try:
    from sidestep._native import PararealSchedule, QueueFull, RowScheduler, parareal_cost
    from sidestep._native import simulate_parareal as _simulate
except ImportError as error:
    raise BackendUnavailable(
        f"engine: the native library is not built ({error}); run `pip install -e .`"
    ) from error

QueueFull.__doc__ = "Too many requests wait; the one that was submitted has changed nothing."

__all__ = [
    "PararealSchedule",
    "QueueFull",
    "RowScheduler",
    "Wavefront",
    "parareal_cost",
    "simulate_parareal",
]


@dataclass(frozen=True, eq=False)
class Wavefront:
    """When every evaluation of an SRDS trajectory is made, and what is there when.

    Attributes:
        ticks: Model calls in a row.
        chart: ``[E, 4]`` of (tick from 0, block from 1, iterate, step), in order of ticks. Block
            and iterate are those of the chain: its first evaluation belongs to that iterate, the
            others to the next one.
        formed: ``[K + 1]`` ticks until the last boundary is there in each iterate.
    """

    ticks: int
    chart: NDArray[np.int64]
    formed: NDArray[np.int64]

    @property
    def evaluations(self) -> int:
        """Of the model, all together."""
        return len(self.chart)

    @property
    def widths(self) -> NDArray[np.int64]:
        """``[ticks]`` evaluations in each tick."""
        return np.bincount(self.chart[:, 0], minlength=self.ticks)


def simulate_parareal(bounds: Sequence[int], iterations: int, width: int = 0) -> Wavefront:
    """The schedule of a trajectory, tick by tick, with nothing but numbers.

    Evaluations with the longest way to the end go first. Where `width` does not matter, the ticks
    are T(B, K) of `sidestep/parareal.h`: K(m - 1) + B in equal blocks.

    Args:
        bounds: ``[B + 1]`` steps: block i is ``[bounds[i - 1], bounds[i])``.
        iterations: K, 0 to B, all of which are made.
        width: Evaluations in a tick at most; 0 for any number.

    Raises:
        ValueError: The bounds do not ascend, or a number is out of range.
    """
    return Wavefront(*_simulate(bounds, iterations, width))
