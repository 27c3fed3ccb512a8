"""The plan of a pipeline's scheduler, as the pipeline has set it up."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestep.adapters.capture import CannotCapture
from sidestep.adapters.scheduler import SidestepScheduler
from sidestep.adapters.swap import restore
from sidestep.runtime.plan import Plan
from sidestep.runtime.scheduler_loop import detached_copy, leaves

_OWN = ("self", "model_output", "timestep", "sample", "generator", "return_dict")
"""Arguments of a scheduler's step that the plan has its own place for."""
_KEPT = 8  # plans of a driver


@dataclass(kw_only=True, eq=False)
class Planned:
    """How ``set_timesteps`` was called.

    Attributes:
        scheduler: The scheduler that it was called on.
        arguments: Its arguments by name.
        compiled: The plans of earlier generations, by all that they depend on.
        begin: The first step that the pipeline takes; known once it has taken it.
    """

    scheduler: Any
    arguments: dict[str, Any]
    compiled: dict[str, Plan]
    begin: int = 0

    @staticmethod
    def of(
        scheduler: Any, args: Sequence[Any], kwargs: Mapping[str, Any], compiled: dict[str, Plan]
    ) -> Planned:
        """Of a call ``scheduler.set_timesteps(*args, **kwargs)``."""
        bound = inspect.signature(scheduler.set_timesteps).bind(*args, **kwargs).arguments
        bound |= bound.pop("kwargs", {})
        given = {name: value for name, value in bound.items() if value is not None}
        return Planned(scheduler=scheduler, arguments=given, compiled=compiled)

    def compile(self, scheduler: Any, given: Mapping[str, Any]) -> Plan:
        """The plan from the step that the pipeline is about to take to the last.

        Args:
            scheduler: Whose step that is.
            given: Its arguments.

        Raises:
            CannotCapture: The pipeline has changed the scheduler in a way that is not known here.
            NotLinearError: The scheduler is no linear program as configured.
        """
        if scheduler is not self.scheduler:
            raise CannotCapture(
                "enable: the pipeline steps another scheduler than the one it called "
                "set_timesteps of; the whole-trajectory driver takes one, use driver='stepwise'"
            )
        if hasattr(scheduler, "noise_sampler"):
            raise CannotCapture(
                f"enable: {type(scheduler).__name__} draws from a noise source of its own, which a "
                "plan does not repeat; use driver='stepwise'"
            )
        times = scheduler.timesteps.detach().cpu().double().numpy()
        self.begin = _begin(scheduler, times, given["timestep"])
        plan = self._plan(scheduler, len(times), given)
        if len(plan) > len(times) - self.begin or not np.array_equal(
            plan.timesteps.astype(np.float32), times[self.begin :][: len(plan)].astype(np.float32)
        ):
            raise CannotCapture(
                f"enable: the pipeline has changed the timesteps of {type(scheduler).__name__} "
                "after set_timesteps; the whole-trajectory driver needs them as they were set, "
                "use driver='stepwise'"
            )
        return plan

    def _plan(self, scheduler: Any, count: int, given: Mapping[str, Any]) -> Plan:
        if isinstance(scheduler, SidestepScheduler):
            return scheduler.plan(self.begin)
        others = {k: v for k, v in self.arguments.items() if k != "num_inference_steps"}
        steps = self.arguments.get("num_inference_steps")
        if steps is None:
            grids = [others[key] for key in ("timesteps", "sigmas") if key in others]
            steps = len(grids[0]) if grids else count
        step = {name: value for name, value in given.items() if name not in _OWN}
        for name, value in step.items():
            if isinstance(value, Tensor):
                raise CannotCapture(
                    f"enable: the pipeline gives {type(scheduler).__name__}.step a tensor {name}, "
                    "which a plan has no place for; use driver='stepwise'"
                )
        plain = detached_copy(scheduler)
        restore(plain)  # a copy has the overrides of the original
        key = _fingerprint(plain, steps, others, step, self.begin)
        if key not in self.compiled:
            self.compiled[key] = Plan.from_scheduler(
                plain, int(steps), set_timesteps=others, step=step, begin_index=self.begin
            )
            for old in list(self.compiled)[:-_KEPT]:
                del self.compiled[old]
        return self.compiled[key]

    def advance(self, scheduler: Any, k: int) -> None:
        """``k`` steps count as taken: the scheduler scales the next input as it would have."""
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = self.begin + k


def _fingerprint(scheduler: Any, *settings: object) -> str:
    """Equal for schedulers that would take the same steps: of everything in them."""
    digest = hashlib.sha256(repr((type(scheduler).__name__, settings)).encode())
    digest.update(repr(getattr(scheduler, "config", None)).encode())
    for leaf in leaves(vars(scheduler)):
        value = leaf.value
        if isinstance(value, Tensor):
            value = value.double().numpy()
        digest.update(leaf.path.encode())
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def _begin(scheduler: Any, times: np.ndarray, timestep: Any) -> int:
    """The index of the step that a pipeline is about to take first."""
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if index is not None:
            return int(index)
    value = float(torch.as_tensor(timestep, device="cpu").flatten()[0])
    return int(np.abs(times - value).argmin())
