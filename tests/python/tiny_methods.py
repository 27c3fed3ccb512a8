"""Methods that skip by rule, to see what a driver makes of a decision whatever the criterion."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sidestep.runtime.methods.criterion import Course, Criterion, Decision, Observation


@dataclass(frozen=True)
class Pattern:
    """All rows alike: '#' computes, '.' skips; a shorter pattern is repeated.

    Attributes:
        marks: For the steps from the first one on.
        weights: Of a skipped row; empty to hold.
    """

    marks: str
    weights: tuple[float, ...] = ()

    def criterion(self) -> Criterion:
        return _Rule(self)

    def skips(self, seen: Observation, row: int) -> bool:
        return self.marks[(seen.step + 1) % len(self.marks)] == "."


@dataclass(frozen=True)
class ByRow:
    """Rows apart: each skips by the sign of one of its own latents, after two steps.

    Attributes:
        weights: Of a skipped row; empty to hold.
    """

    weights: tuple[float, ...] = (1.5, -0.5)

    def criterion(self) -> Criterion:
        return _Rule(self)

    def skips(self, seen: Observation, row: int) -> bool:
        latents: Tensor = seen.x_next[row].flatten()
        return seen.step > 0 and bool(latents[7 * seen.step % len(latents)] > 0)


NEVER = Pattern("#")


class _Rule:
    def __init__(self, method: Any) -> None:
        self.method = method
        self.history = max(1, len(method.weights))

    def start(self, course: Course) -> None:
        self.course = course

    def observe(self, seen: Observation) -> Decision:
        rows = range(self.course.rows)
        skips = [self.method.skips(seen, row) for row in rows]
        return Decision(
            compute=[not skip for skip in skips],
            reasons=["skipped" if skip else "criterion" for skip in skips],
            weights=[self.method.weights for _ in rows] if self.method.weights else None,
        )


def marks(handle: Any) -> list[str]:
    return ["".join(".#"[call] for call in row) for row in handle.summary().skip_map]
