"""The DPM-Solver family in closed form; `Solver` has the settings, `SOLVERS` the known names."""

from sidestep.runtime.grids import GRIDS, find_grid
from sidestep.runtime.solvers.presets import (
    DEFAULT_FLOW_GRID,
    DEFAULT_GRID,
    DEFAULT_SOLVER,
    SOLVERS,
    find_solver,
)
from sidestep.runtime.solvers.settings import Solver

__all__ = [
    "DEFAULT_FLOW_GRID",
    "DEFAULT_GRID",
    "DEFAULT_SOLVER",
    "GRIDS",
    "SOLVERS",
    "Solver",
    "find_grid",
    "find_solver",
]
