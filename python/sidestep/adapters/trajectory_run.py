"""Running a recorded trajectory in the engine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sidestep.adapters.trajectory_graphs import PipelineGraphs
from sidestep.adapters.trajectory_ranks import run_on_ranks
from sidestep.adapters.trajectory_record import Trajectory
from sidestep.runtime.denoisers import RecordedDenoiser, RecordedStep
from sidestep.runtime.engine import Batch, Request, Result
from sidestep.runtime.exits.draft import Drafting
from sidestep.runtime.methods.criterion import Course, Criterion, Decision, Method, Observation
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.plan_course import plan_course

if TYPE_CHECKING:
    from sidestep.runtime.ranks import Ranks

_MOST_BRANCHES = 3  # of the fused step; the denoiser combines more of them itself
_TABLE_STEPS = 256  # or the next power of two: trajectories of other lengths fit as well
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run_trajectory(
    trajectory: Trajectory,
    method: Method | SRDS | None,
    noise: Callable[[int, int], Tensor] | None,
    on_step: Callable[[int, Tensor, Sequence[int]], object] | None,
    ranks: Ranks | None = None,
    graphs: PipelineGraphs | None = None,
    drafting: Drafting | None = None,
) -> tuple[Result, int, str]:
    """Runs all of it, in an engine or over the ranks of a job.

    Returns:
        What became of it, the number of model calls, those of the recording included, and what is
        to be said of CUDA graphs.

    Raises:
        RankError: Something went wrong on a rank.
        ValueError: The ranks have another device, or another number of guidance branches.
    """
    plan, start, steps = trajectory.plan, trajectory.start, trajectory.steps
    mixes = _mixes(trajectory)
    denoiser = RecordedDenoiser(
        rows=len(start), shape=start.shape[1:], steps=steps, mixes=mixes, drafting=drafting
    )
    if drafting is not None:
        drafting.begin(trajectory.course or plan_course(plan))
    branches = 1 if mixes is not None else len(trajectory.library.branches)
    dtype = steps[0].calls[0].arguments.dtype
    dtype = dtype if dtype in _DTYPES else torch.float32
    chosen: Method | SRDS | None = method
    if method is not None and not isinstance(method, SRDS):
        chosen = Interrupted(method, kinds_of(steps))
    request = Request(
        plan=plan,
        x=start.float(),
        guidance=[[1.0]] * len(plan) if mixes is not None else _weights(trajectory),
        method=chosen,
        course=trajectory.course,
        noise=noise,
        on_step=on_step,
    )

    def model(batch: Batch) -> Tensor:
        lines = list(zip(batch.steps, batch.rows, batch.branches, strict=True))
        return denoiser(batch.x, lines).to(dtype)

    if ranks is None:
        sizing = _sizing(request, branches, dtype)
        result, said = (graphs or PipelineGraphs("off")).run(request, denoiser, branches, sizing)
    else:
        result = run_on_ranks(ranks, trajectory, request, model, dtype)
        said = "" if graphs is None else graphs.without(start.device, "ranks launch what they run")
    return result, denoiser.ticks + len(steps[0].calls), said


def _sizing(request: Request, branches: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of the engine for a request, the same for others of its size."""
    plan, x, method = request.plan, request.x, request.method
    history, capacity = 0, len(x)
    if isinstance(method, SRDS):
        capacity *= method.rows(len(plan))
    elif method is not None:
        history = method.criterion().history
    return {
        "shape": tuple(x.shape[1:]),
        "capacity": capacity,
        "buckets": tuple(range(1, branches * capacity + 1)),
        "dtype": dtype,
        "device": x.device,
        "registers": plan.registers,
        "history": history,
        "branches": branches,
        "queue": 1,
        "table_steps": max(_TABLE_STEPS, 1 << (len(plan) - 1).bit_length()),
    }


def _weights(trajectory: Trajectory) -> list[list[float]]:  # [K][G]
    """0 for a branch that a step does not have."""
    count = len(trajectory.library.branches)
    return [[float(of.get(b, 0.0)) for b in range(count)] for of in trajectory.weights]


def _mixes(trajectory: Trajectory) -> list[Tensor] | None:  # K of [G, ...]
    """The weights, where the engine cannot take them."""
    count = len(trajectory.library.branches)
    scalar = all(w.dim() == 0 for of in trajectory.weights for w in of.values())
    if scalar and count <= _MOST_BRANCHES:
        return None
    dim = trajectory.start.dim() - 1
    mixes = []
    for of in trajectory.weights:
        weights = [of.get(b, torch.zeros((), device="cpu")) for b in range(count)]
        wide = [w.view(*w.shape, *[1] * (dim - w.dim())) for w in weights]
        mixes.append(torch.stack(torch.broadcast_tensors(*wide)))
    return mixes


Kind = tuple[tuple[Hashable, int], ...]
"""The model calls of a step: which model, and the size of its batch."""


def kinds_of(steps: Sequence[RecordedStep]) -> tuple[Kind, ...]:  # [K]
    """What may be held from one step to another: a call's output, where the call stays the same."""
    return tuple(
        tuple((call.arguments.key, call.arguments.batch) for call in step.calls) for step in steps
    )


@dataclass(frozen=True)
class Interrupted:
    """A method in a trajectory whose model calls change on the way, as when guidance ends.

    Attributes:
        method: The method.
        kinds: ``[K]`` the model calls of each step.
    """

    method: Method
    kinds: tuple[Kind, ...]

    def criterion(self) -> Criterion:
        """The method's own, or one that computes where it has nothing to go on with."""
        own = self.method.criterion()
        return own if len(set(self.kinds)) == 1 else _Interrupted(own, self.kinds)


class _Interrupted:
    """Lets a row skip where the stepwise driver could: every call of the step has its outputs."""

    def __init__(self, own: Criterion, kinds: tuple[Kind, ...]) -> None:
        self.own, self.kinds, self.history = own, kinds, own.history
        self.computed: list[list[int]] = []  # by row, its last steps, newest first

    def start(self, course: Course) -> None:
        """A trajectory begins."""
        self.own.start(course)
        self.computed = [[] for _ in range(course.rows)]

    def observe(self, seen: Observation) -> Decision:
        """The method's decision, but for rows that would have nothing to go on with."""
        decision = self.own.observe(seen)
        compute, reasons = list(decision.compute), list(decision.reasons)
        for row, computed in enumerate(self.computed):
            if seen.computed[row]:
                computed.insert(0, seen.step)
                del computed[self.history :]
            weights = () if decision.weights is None else decision.weights[row]
            lacking = self._lacking(seen.step + 1, computed[: max(1, len(weights))])
            if lacking and not compute[row]:
                compute[row], reasons[row] = True, lacking
        return replace(decision, compute=compute, reasons=reasons)

    def _lacking(self, coming: int, used: Sequence[int]) -> str:
        """Why the outputs of the steps ``used`` do not serve the coming one; empty if they do."""
        if coming >= len(self.kinds):
            return ""
        for slot, (model, batch) in enumerate(self.kinds[coming]):
            before = [self.kinds[step][slot : slot + 1] for step in used]
            if before[0] and before[0][0][1] != batch:
                return "batch changed"
            if any(kind != ((model, batch),) for kind in before):
                return "no output to reuse"
        return ""
