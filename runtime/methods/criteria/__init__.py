"""The criteria that `Adaptive` chooses from by name; one formula a file."""

from __future__ import annotations

from typing import Protocol

from sidestep.runtime.methods.criteria.elementwise import Elementwise
from sidestep.runtime.methods.criteria.entropy import Entropy
from sidestep.runtime.methods.criteria.error_control import ErrorControl
from sidestep.runtime.methods.criteria.features import Features
from sidestep.runtime.methods.criteria.gate import Gate
from sidestep.runtime.methods.criteria.learned import Learned
from sidestep.runtime.methods.criteria.third_difference import Published, ThirdDifference
from sidestep.runtime.methods.criteria.windowed import Windowed
from sidestep.runtime.methods.criterion import Criterion


class Mode(Protocol):
    """What a class in `CRITERIA` is: a criterion made from a gate, and its own settings for it."""

    @property
    def DEFAULTS(self) -> Gate: ...
    def __call__(self, gate: Gate) -> Criterion: ...


CRITERIA: dict[str, Mode] = {
    "error-control": ErrorControl,
    "paper": Published,
    "third-difference": ThirdDifference,
    "elementwise": Elementwise,
    "windowed": Windowed,
    "entropy": Entropy,
    "features": Features,
    "learned": Learned,
}
