"""sidestep: diffusion sampling with fewer, cheaper or parallel model calls, and the same picture.

    import sidestep
    with sidestep.enable(pipe, sidestep.Adaptive()) as handle:
        images = pipe("frog on a bicycle").images
    print(handle.summary())

Where things are decided: a prompt enters in the user's own pipeline (or `sidestep.sampling` for
the command line); the model is called in `sidestep.runtime.stepwise`; a step is computed by
`sidestep.kernels.solver_step` from a `Plan`; what is skipped is decided in
`sidestep.runtime.methods.criteria`. Which steps run side by side is decided in
`csrc/core/parareal.cpp`, when SRDS stops in `sidestep.runtime.methods.srds`, and whether it pays on
a device in `sidestep.runtime.planner`, from what `sidestep.planning` measures.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Adaptive": "sidestep.runtime.methods.adaptive",
    "BackendUnavailable": "sidestep.kernels",
    "Calibration": "sidestep.runtime.calibration",
    "DynamicThreshold": "sidestep.runtime.thresholding",
    "EarlyExit": "sidestep.runtime.methods.early_exit",
    "Engine": "sidestep.runtime.engine",
    "EngineLoop": "sidestep.runtime.engine_loop",
    "Plan": "sidestep.runtime.plan",
    "QueueFull": "sidestep.runtime.engine",
    "RankError": "sidestep.runtime.ranks",
    "Ranks": "sidestep.runtime.ranks",
    "Request": "sidestep.runtime.engine",
    "Result": "sidestep.runtime.engine",
    "SRDS": "sidestep.runtime.methods.srds",
    "SidestepScheduler": "sidestep.adapters.scheduler",
    "Solver": "sidestep.runtime.solvers",
    "auto": "sidestep.planning",
    "disable": "sidestep.adapters.enable",
    "enable": "sidestep.adapters.enable",
    "load_pipeline": "sidestep.models",
    "sample": "sidestep.runtime.sample",
}

__all__ = [
    "SRDS",
    "Adaptive",
    "BackendUnavailable",
    "Calibration",
    "DynamicThreshold",
    "EarlyExit",
    "Engine",
    "EngineLoop",
    "Plan",
    "QueueFull",
    "RankError",
    "Ranks",
    "Request",
    "Result",
    "SidestepScheduler",
    "Solver",
    "__version__",
    "auto",
    "disable",
    "enable",
    "load_pipeline",
    "sample",
]

if TYPE_CHECKING:
    from sidestep.adapters.enable import disable, enable
    from sidestep.adapters.scheduler import SidestepScheduler
    from sidestep.kernels import BackendUnavailable
    from sidestep.models import load_pipeline
    from sidestep.planning import auto
    from sidestep.runtime.calibration import Calibration
    from sidestep.runtime.engine import Engine, QueueFull, Request, Result
    from sidestep.runtime.engine_loop import EngineLoop
    from sidestep.runtime.methods.adaptive import Adaptive
    from sidestep.runtime.methods.early_exit import EarlyExit
    from sidestep.runtime.methods.srds import SRDS
    from sidestep.runtime.plan import Plan
    from sidestep.runtime.ranks import RankError, Ranks
    from sidestep.runtime.sample import sample
    from sidestep.runtime.solvers import Solver
    from sidestep.runtime.thresholding import DynamicThreshold


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: ``import sidestep`` is quick and touches nothing."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sidestep' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
