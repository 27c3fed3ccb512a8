"""Operators `sidestep::*` and their backends: native C++, Triton and plain torch.

Importing this package loads no backend and touches no GPU; see `operators` for the list of
operators and `config` for the choice of a backend.
"""

from __future__ import annotations

from sidestep.kernels.checks import table_width
from sidestep.kernels.config import use_backend
from sidestep.kernels.errors import BackendUnavailable
from sidestep.kernels.operators import (
    difference_gram,
    exit_compact_,
    exit_decide,
    exit_score,
    parareal_correct_,
    solver_step,
)
from sidestep.kernels.prepared import PreparedStep

__all__ = [
    "BackendUnavailable",
    "PreparedStep",
    "difference_gram",
    "exit_compact_",
    "exit_decide",
    "exit_score",
    "parareal_correct_",
    "solver_step",
    "table_width",
    "use_backend",
]
