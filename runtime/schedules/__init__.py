"""Noise schedules; `sidestep.runtime.schedules.base` has the conventions."""

from sidestep.runtime.schedules.base import Schedule, VariancePreserving
from sidestep.runtime.schedules.continuous import (
    CosineVP,
    FlowMatching,
    LinearVP,
    VarianceExploding,
)
from sidestep.runtime.schedules.discrete import DiscreteVP

__all__ = [
    "CosineVP",
    "DiscreteVP",
    "FlowMatching",
    "LinearVP",
    "Schedule",
    "VarianceExploding",
    "VariancePreserving",
]
