"""How long a device takes for model calls of each size, and for what is beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, nnls


@dataclass(frozen=True)
class Latency:
    """How long a model call takes: what was measured, and a line through it.

    Attributes:
        points: (evaluations in the call, seconds), ascending. An evaluation is one image at one
            time, with all its guidance branches; half of one is one of two branches.

    Raises:
        ValueError: There are fewer than two sizes, or they do not ascend from above 0.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if len(sizes) < 2 or any(b <= a for a, b in zip([0.0, *sizes], sizes, strict=False)):
            raise ValueError(f"Latency: sizes are {sizes}, expected two or more that ascend from 0")
        if not all(math.isfinite(seconds) and seconds > 0 for _, seconds in self.points):
            raise ValueError("Latency: expected times above 0")

    @cached_property
    def line(self) -> tuple[float, float]:
        """(t1, a) of t(b) = t1 (a + (1 - a) b): least squares of the relative error.

        a is what a call costs whatever its size: 0 where nothing is gained by making evaluations
        together, 1 where all but the first are free.
        """
        sizes, seconds = np.array(self.points).T
        (fixed, each), _ = nnls(np.stack([1 / seconds, sizes / seconds], 1), np.ones(len(sizes)))
        return float(fixed + each), float(fixed / (fixed + each))

    @cached_property
    def _measured(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sizes and times, the times made to ascend."""
        sizes, seconds = np.array(self.points).T
        return sizes, isotonic_regression(seconds).x

    def __call__(
        self,
        evaluations: NDArray[np.float64] | float,  # any shape
    ) -> NDArray[np.float64]:
        """Seconds of calls with so many evaluations; 0 evaluations are no call.

        Between two measured sizes on the line through them, below the smallest and above the
        greatest parallel to the fitted line.
        """
        sizes, seconds = self._measured
        b = np.asarray(evaluations, dtype=np.float64)
        t1, a = self.line
        beyond = np.where(b > sizes[-1], b - sizes[-1], np.minimum(b - sizes[0], 0))
        time = np.interp(b, sizes, seconds) + t1 * (1 - a) * beyond
        return np.where(b > 0, np.maximum(time, 0), 0.0)


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Seconds beside the model.

    Attributes:
        record: For each step of the plan, once: the pipeline's loop is recorded.
        tick: For each tick: the engine's turn.
        evaluation: For each evaluation in a tick: its step, its boundaries.
        message: For each tick with several ranks: a boundary goes from one to the next.
    """

    record: float = 0.0
    tick: float = 0.0
    evaluation: float = 0.0
    message: float = 0.0
