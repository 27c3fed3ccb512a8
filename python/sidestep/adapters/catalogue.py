"""Solvers by name: our plans, and any diffusers scheduler by its class."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import SchedulerMixin

from sidestep.adapters.scheduler import SidestepScheduler
from sidestep.errors import UserError
from sidestep.runtime.grids import GRIDS
from sidestep.runtime.plan import Plan
from sidestep.runtime.solvers import DEFAULT_GRID, SOLVERS, find_solver

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIMScheduler": ("DDIMScheduler", {}),
    "PNDMScheduler": ("PNDMScheduler", {"skip_prk_steps": True}),
    "PNDMScheduler trailing": (
        "PNDMScheduler",
        {"skip_prk_steps": True, "timestep_spacing": "trailing"},
    ),
    "EulerDiscreteScheduler": ("EulerDiscreteScheduler", {}),
    "HeunDiscreteScheduler": ("HeunDiscreteScheduler", {}),
    "DEISMultistepScheduler": ("DEISMultistepScheduler", {}),
    "UniPCMultistepScheduler": ("UniPCMultistepScheduler", {}),
    "DPMSolverMultistepScheduler": ("DPMSolverMultistepScheduler", {}),
    "DPMSolverMultistepScheduler trailing": (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "trailing"},
    ),
    "DPMSolverMultistepScheduler karras": (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True},
    ),
    "DPMSolverMultistepScheduler lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    "DPMSolverSinglestepScheduler": ("DPMSolverSinglestepScheduler", {}),
}
"""diffusers' own schedulers in the benchmark: label -> class and settings."""


def peer_scheduler(label: str, config: Any) -> SchedulerMixin:
    """One of `PEERS` for the model that ``config`` belongs to."""
    name, settings = PEERS[label]
    return getattr(diffusers, name).from_config(config, **settings)


def make_scheduler(solver: str | None, grid: str | None, own: Any) -> SchedulerMixin:
    """The scheduler of that name for the model whose own scheduler is given.

    Args:
        solver: One of ours, a diffusers scheduler class (case and ``Scheduler`` may be left out),
            or None for the pipeline's own.
        grid: A time grid, for ours only; None for the default.

    Raises:
        UserError: A name is unknown, or a grid was given for a scheduler of diffusers.
    """
    if grid is not None and grid not in GRIDS:
        raise UserError(f"--grid: {grid!r} is unknown, expected one of {', '.join(GRIDS)}")
    if solver in SOLVERS:
        try:
            return SidestepScheduler.from_config(
                own.config, solver=solver, grid=grid or DEFAULT_GRID
            )
        except ValueError as error:
            raise UserError(f"--solver: {error}") from error
    if grid is not None:
        raise UserError(f"--grid: got {grid!r} without a solver of ours ({', '.join(SOLVERS)})")
    if solver is None:
        return type(own).from_config(own.config)
    found = _diffusers_class(solver)
    if found is None:
        raise UserError(
            f"--solver: {solver!r} is neither one of ours ({', '.join(SOLVERS)}) nor a scheduler "
            "class of diffusers, such as EulerDiscreteScheduler"
        )
    try:
        return found.from_config(own.config)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"--solver: {found.__name__} does not fit this model: {error}") from error


def _diffusers_class(name: str) -> Any:
    wanted = name.lower().removesuffix("scheduler")
    for attribute in dir(diffusers):
        if attribute.endswith("Scheduler") and attribute[: -len("Scheduler")].lower() == wanted:
            return getattr(diffusers, attribute)
    return None


def solver_name(solver: str | None, grid: str | None, own: Any) -> str:
    """The short name in tables: ``dpmsolver++2m karras``, ``ddim``, ``euler``."""
    if solver in SOLVERS:
        return f"{solver} {grid or DEFAULT_GRID}"
    found = type(own) if solver is None else _diffusers_class(solver)
    name = (found.__name__ if found else str(solver)).removesuffix("Scheduler")
    return name.removesuffix("Discrete").lower()


def named_plan(solver: str, grid: str, own: Any, steps: int) -> Plan:
    """One of our plans for the model whose own scheduler is given."""
    scheduler = SidestepScheduler.from_config(own.config, solver=solver, grid=grid)
    return find_solver(solver).plan(
        scheduler.schedule, GRIDS[grid], steps, prediction=scheduler.config.prediction_type
    )
