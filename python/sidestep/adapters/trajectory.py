"""The whole-trajectory driver: a pipeline's loop says what to do, and the engine does it.

While the pipeline loops, its model calls are written down and answered with random tensors,
and its scheduler's steps with stand-ins for the latents.  What the pipeline makes of the answers
shows the guidance weights of each step.  At the last step the whole trajectory runs in the engine,
with the scheduler compiled into a plan, and its end is what that step returns.

Only the first model call of every kind is a real one: it shows what the model returns, and it is
the first evaluation of the trajectory at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from sidestep.adapters.attach_course import course_of
from sidestep.adapters.capture import Call, CannotCapture, read_call
from sidestep.adapters.guidance import probe
from sidestep.adapters.trajectory_graphs import PipelineGraphs
from sidestep.adapters.trajectory_plan import Planned
from sidestep.adapters.trajectory_record import Trajectory
from sidestep.adapters.trajectory_run import run_trajectory
from sidestep.runtime import ranges
from sidestep.runtime.denoisers import FromHelper, prediction
from sidestep.runtime.exits.draft import Drafting
from sidestep.runtime.generation import Generation
from sidestep.runtime.methods.criterion import Method
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.plan import Plan
from sidestep.runtime.summary import Summary

if TYPE_CHECKING:
    from sidestep.runtime.ranks import Ranks

_HELPERS = 100_000  # stand-ins for what helpers return are numbered from here
OnStep = Callable[[int, Tensor, Sequence[int]], object]


@dataclass(kw_only=True, eq=False)
class _Recording:
    """All state of one generation.

    Attributes:
        planned: How ``set_timesteps`` was called.
        kinds: What the model returned in the first step, by call.
        calls: Of the current step.
        helper_kinds: What each helper returned in the first step.
        helpers: Calls of helpers in the current step.
        made: By id, the tensors that they returned, and what these stand for.
        trajectory: What is known since the first step.
        done: Whether the result was handed over.
    """

    planned: Planned | None = None
    kinds: list[Any] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    helper_kinds: list[Any] = field(default_factory=list)
    helpers: list[Call] = field(default_factory=list)
    made: dict[int, tuple[Tensor, FromHelper]] = field(default_factory=dict)
    trajectory: Trajectory | None = None
    done: bool = False

    @property
    def step(self) -> int:
        """The current one."""
        return 0 if self.trajectory is None else len(self.trajectory.steps)


class WholeTrajectory:
    """Drives a pipeline, one generation after another.

    Attributes:
        method: Settings of a method, or None to call the model at every step.
        on_step: Called ``on_step(k, x, rows)`` as in `Request`, with the real latents.
        ranks: The processes that run each trajectory together; None for this one alone.
        graphs: Of the model calls.
        drafting: Cuts the evaluations short of which SRDS makes a draft only; None without exits.
    """

    def __init__(
        self,
        method: Method | SRDS | None = None,
        on_step: OnStep | None = None,
        ranks: Ranks | None = None,
        graphs: str = "auto",
        drafting: Drafting | None = None,
    ) -> None:
        """Makes a driver; nothing is touched.

        Raises:
            ValueError: There is no such setting of graphs.
        """
        self.method, self.on_step, self.ranks = method, on_step, ranks
        self.graphs = PipelineGraphs(graphs)
        self.drafting = drafting
        self._recording = _Recording()
        self._summary: Summary | None = None
        self._compiled: dict[str, Plan] = {}

    # -- what the host says -----------------------------------------------------------------------

    def begin(self) -> None:
        """A generation begins: nothing of the one before is used again."""
        self.release()

    def release(self) -> None:
        """The generation is over, however it ended."""
        self._recording = _Recording()

    def finish(self) -> None:
        """The pipeline's call has returned.

        Raises:
            RuntimeError: It has left its loop early, so that what it returned was never computed.
        """
        trajectory = self._recording.trajectory
        if trajectory is not None and not self._recording.done:
            raise RuntimeError(
                f"enable: the pipeline stopped after {len(trajectory.steps)} of "
                f"{len(trajectory.plan)} steps, and the whole-trajectory driver computes at the "
                "last one: what it returned is noise; use driver='stepwise'"
            )

    def plan(self, scheduler: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The pipeline has called ``scheduler.set_timesteps(*args, **kwargs)``."""
        self.begin()
        self._recording.planned = Planned.of(scheduler, args, kwargs, self._compiled)

    def predict(
        self,
        model: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        key: Hashable = None,
        compiled: bool = False,
    ) -> Any:
        """Stands for ``model(*args, **kwargs)``: what the model returns, filled with a probe.

        Args:
            model: The model.
            args: Its arguments.
            kwargs: Its arguments by name.
            key: Not used: branches are told apart by their arguments.
            compiled: Whether a new batch size costs a compilation.

        Raises:
            CannotCapture: The call has no latents that could be taken over.
        """
        recording = self._recording
        if recording.done:
            raise CannotCapture(
                "enable: the pipeline calls its model after its last step; the whole-trajectory "
                "driver expects set_timesteps before, use driver='stepwise'"
            )
        call = read_call(model, args, kwargs, recording.made, whole=compiled)
        number = len(recording.calls)
        if recording.trajectory is None:
            recording.kinds.append(self._first(call, args, kwargs))
        kind = recording.kinds[min(number, len(recording.kinds) - 1)]
        like = prediction(kind)
        shape = (call.arguments.batch, *like.shape[1:])
        answer = probe(shape, recording.step, number, like.device)
        call.probe = answer
        recording.calls.append(call)
        return tree_map_only(Tensor, lambda leaf: answer.clone() if leaf is like else leaf, kind)

    def assist(
        self,
        model: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        key: Hashable = None,
        compiled: bool = False,
    ) -> Any:
        """Stands for the call of a helper, such as a ControlNet: it is called beside the model.

        Args:
            model: The helper.
            args: Its arguments.
            kwargs: Its arguments by name.
            key: As in `predict`.
            compiled: As in `predict`.

        Raises:
            CannotCapture: The call has no latents that could be taken over.
        """
        recording = self._recording
        call = read_call(model, args, kwargs, recording.made, whole=compiled)
        number, batch = len(recording.helpers), call.arguments.batch
        if recording.trajectory is None:
            recording.helper_kinds.append(model(*args, **kwargs))
        kind = recording.helper_kinds[min(number, len(recording.helper_kinds) - 1)]
        leaves, spec = tree_flatten(kind)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if recording.trajectory is not None:
                    place = _HELPERS + 1000 * number + i
                    made = probe((batch, *leaf.shape[1:]), recording.step, place, leaf.device)
                    leaf = made.to(leaf.dtype)
                leaves[i] = leaf
                recording.made[id(leaf)] = (leaf, FromHelper(number, i))
        recording.helpers.append(call)
        return tree_unflatten(leaves, spec)

    def step(
        self, scheduler: Any, given: Mapping[str, Any], announced: int | None = None
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Stands for ``scheduler.step(**given)``: the last one returns the result.

        Args:
            scheduler: The scheduler.
            given: The arguments of its step.
            announced: Steps of the pipeline's loop, which may end before the timesteps do
                (``denoising_end``); None for all of them.

        Raises:
            CannotCapture: The pipeline does something that cannot be taken over; it says what.
            NotLinearError: The scheduler cannot be compiled.
        """
        recording, latents = self._recording, given["sample"]
        if not recording.calls or recording.planned is None:
            raise CannotCapture(
                f"enable: {type(scheduler).__name__}.step came without a model call and "
                "set_timesteps before it; the whole-trajectory driver needs both, use "
                "driver='stepwise'"
            )
        trajectory = recording.trajectory
        if trajectory is None:
            plan = recording.planned.compile(scheduler, given)
            if announced and announced < len(plan):
                plan = plan[:announced]
            trajectory = Trajectory.begin(plan, latents, recording.calls, given["model_output"])
            knows = self.method is not None and not isinstance(self.method, SRDS)
            if knows or self.drafting is not None:
                # the scheduler knows more than its plan shows; the stepwise driver is told the same
                trajectory.course = course_of(scheduler, given["timestep"], announced)
            recording.trajectory = trajectory
        trajectory.record(latents, recording.calls, recording.helpers, given["model_output"])
        recording.planned.advance(scheduler, len(trajectory.steps))
        recording.calls, recording.helpers, recording.made = [], [], {}
        if len(trajectory.steps) < len(trajectory.plan):
            result = trajectory.stand_in.clone()
        else:
            result = self._run(trajectory, latents, given.get("generator"))
            recording.done = True
        return SchedulerOutput(prev_sample=result) if given.get("return_dict", True) else (result,)

    def summary(self) -> Summary:
        """The last generation that came to its end."""
        return self._summary or Generation().summary(self._label)

    @property
    def _label(self) -> str:
        return "every call" if self.method is None else repr(self.method)

    # -- what is done -----------------------------------------------------------------------------

    def _first(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the model returns at the first step: its own output, an evaluation made."""
        with ranges.within("model"):
            kind = call.arguments.model(*args, **kwargs)
        _expect_one_output(kind, call.arguments.batch)
        call.output = prediction(kind).detach().clone()  # a CUDA graph writes there again
        return kind

    def _run(self, trajectory: Trajectory, latents: Tensor, generator: Any) -> Tensor:
        """Runs the trajectory: ``[S, ...]`` like ``latents``."""
        trajectory.library.expect_unwritten()
        noise = trajectory.noise(latents, generator)
        result, ticks, graphs = run_trajectory(
            trajectory, self.method, noise, self.on_step, self.ranks, self.graphs, self.drafting
        )
        if result.error is not None:
            raise result.error
        self._summary = replace(result.summary, method=self._label, ticks=ticks, graphs=graphs)
        if self.drafting is not None:
            notes = (self._summary.note, self.drafting.note)
            self._summary = replace(self._summary, note="; ".join(filter(None, notes)))
        assert result.x is not None
        return trajectory.layout.outward(result.x).to(latents.dtype)


def _expect_one_output(kind: Any, batch: int) -> None:
    """Raises CannotCapture unless a model returned a single tensor ``[batch, ...]``."""
    shapes = [list(leaf.shape) for leaf in tree_leaves(kind) if isinstance(leaf, Tensor)]
    if len(shapes) != 1 or shapes[0][:1] != [batch]:
        raise CannotCapture(
            f"enable: the model returned tensors {shapes} for a batch of {batch}, and the "
            "whole-trajectory driver expects one with a line for each; use driver='stepwise'"
        )
