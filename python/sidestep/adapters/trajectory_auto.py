"""``enable(pipe, "auto")``: the first generation is measured, and each runs as is quickest here."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from torch import Tensor

from sidestep.adapters.trajectory import OnStep, WholeTrajectory
from sidestep.adapters.trajectory_record import Trajectory
from sidestep.planning import FEWEST_STEPS, measure_recorded
from sidestep.runtime.latency import Latency, Overhead
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.planner import plan, settings_of

_BUDGET = 10.0  # seconds for measuring
_REPEATS = 3


class Deciding(WholeTrajectory):
    """Runs a trajectory with SRDS where that is quicker than one call after the other.

    What it compares are the two ways of the engine, so that the recording of the pipeline's loop,
    which both need, does not count.  Generations of the same shape are not measured again.
    """

    def __init__(self, on_step: OnStep | None = None, graphs: str = "auto") -> None:
        """Makes a driver; nothing is touched."""
        super().__init__(None, on_step, graphs=graphs)
        self._measured: dict[Hashable, tuple[Latency, Overhead]] = {}

    def _run(self, trajectory: Trajectory, latents: Tensor, generator: Any) -> Tensor:
        """Decides, and runs: ``[S, ...]`` like ``latents``."""
        method, reason = self._decide(trajectory)
        self.method = method
        result = super()._run(trajectory, latents, generator)
        name = "serial" if method is None else f"srds in {method.blocks} blocks"
        self._summary = replace(self.summary(), note=f"auto: {name}: {reason}")
        return result

    def _decide(self, trajectory: Trajectory) -> tuple[SRDS | None, str]:
        """The settings, None for every call in turn; and why."""
        steps, rows = len(trajectory.plan), len(trajectory.start)
        if steps < FEWEST_STEPS:
            return None, f"{steps} steps are too few to run side by side"
        try:
            SRDS().check(trajectory.plan)
        except ValueError as error:
            return None, str(error)
        call = trajectory.steps[0].calls[0].arguments
        branches = len(trajectory.library.branches)
        key = (call.key, call.batch, call.dtype, trajectory.start.shape, branches)
        if key not in self._measured:
            measured = measure_recorded(trajectory, repeats=_REPEATS, budget=_BUDGET)
            self._measured[key] = measured.latency, measured.overhead
        latency, overhead = self._measured[key]
        largest, _ = latency.points[-1]
        # no call is made that is larger than those that are known to fit into the memory
        widths = [max(1, int(largest) // rows)]
        decision = plan(
            latency, steps, images=rows, branches=branches, widths=widths, overhead=overhead
        )
        return settings_of(decision.choice), decision.reason
