"""Driving a diffusers scheduler as a pipeline would, without importing diffusers.

A scheduler is anything with ``set_timesteps``, ``timesteps`` and ``step``.  What single classes
need beyond that is declared here as data, by class name or by the name of an argument.
"""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Their ``timesteps`` hold the end point as well, at which pipelines do not call the model.
_LISTS_END_POINT = ("DDPMWuerstchenScheduler", "LTXEulerAncestralRFScheduler", "SCMScheduler")
# Their ``step`` wants the time once per row of the batch.
_TIME_PER_ROW = ("DDPMWuerstchenScheduler", "ScoreSdeVpScheduler")
# How classes name what they are given; every other argument must have a default or be passed.
_ARGUMENTS = {
    "model_output": "u", "score": "u", "timestep": "t", "t": "t", "sample": "x", "x": "x",
}  # fmt: skip
# State that the pipeline carries for the scheduler: argument -> its place in the result of step.
_CARRIED = {"old_pred_original_sample": 1}
_RESERVED = {
    *_ARGUMENTS, *_CARRIED, "generator", "num_inference_steps", "return_dict", "timestep_back",
    "variance_noise",
}  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """One value inside a scheduler and where it is kept, so that it can be replaced."""

    path: str
    owner: Any
    key: Any

    @property
    def value(self) -> Any:
        return self.owner[self.key]

    def replace(self, value: object) -> None:
        self.owner[self.key] = value


def leaves(value: Any, path: str = "") -> Iterator[Leaf]:
    """Every value in a scheduler's attributes, inside lists, dicts and nested schedulers too."""
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = [(k, v) for k, v in value.items() if k != "_internal_dict"]
    else:
        items = list(enumerate(value))
    for key, item in items:
        name = f"{path}.{key}" if isinstance(value, dict) else f"{path}[{key}]"
        if isinstance(item, (dict, list, deque)):
            yield from leaves(item, name)
        elif hasattr(item, "step") and hasattr(item, "timesteps"):
            yield from leaves(vars(item), name)
        else:
            yield Leaf(name, value, key)


def detached_copy(scheduler: Any) -> Any:
    """A deep copy on the CPU that shares nothing, whatever the scheduler was used for before."""
    memo: dict[int, Any] = {}
    for leaf in leaves(vars(scheduler)):
        if isinstance(leaf.value, Tensor):
            memo[id(leaf.value)] = leaf.value.detach().to("cpu", copy=True)
        elif leaf.path == ".noise_sampler":
            memo[id(leaf.value)] = leaf.value
    return copy.deepcopy(scheduler, memo)


@dataclass(frozen=True)
class Request:
    """How a scheduler is to be run.

    Attributes:
        steps: ``num_inference_steps``.
        set_timesteps: Other arguments of ``set_timesteps``.
        step: Other arguments of ``step``.
        method: The method that makes a step.
        begin_index: The call to begin with.
    """

    steps: int
    set_timesteps: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    method: str = "step"
    begin_index: int = 0

    def check(self, scheduler: Any) -> None:
        """Raises ValueError or TypeError for what this scheduler cannot be asked."""
        name = type(scheduler).__name__
        if not callable(getattr(scheduler, "set_timesteps", None)):
            raise TypeError(
                f"Plan.from_scheduler: {name} is no scheduler, it has no set_timesteps()"
            )
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(
                f"Plan.from_scheduler: num_inference_steps is {self.steps!r}, expected at least 1"
            )
        if not callable(getattr(scheduler, self.method, None)):
            known = [m for m in ("step", "step_pred") if hasattr(scheduler, m)]
            raise ValueError(
                f"Plan.from_scheduler: {name} has no {self.method}(), expected method={known}"
            )
        for label, given, function in (
            ("set_timesteps", self.set_timesteps, scheduler.set_timesteps),
            ("step", self.step, getattr(scheduler, self.method)),
        ):
            known = [p for p in inspect.signature(function).parameters if p not in _RESERVED]
            if unknown := sorted(set(given) - set(known)):
                raise ValueError(
                    f"Plan.from_scheduler: {label} has {unknown}, expected some of {known}"
                )
        parameters = inspect.signature(getattr(scheduler, self.method)).parameters.values()
        supplied = _RESERVED | set(self.step)
        required = [p.name for p in parameters if p.default is p.empty and not _is_star(p)]
        if missing := [p for p in required if p not in supplied]:
            raise ValueError(
                f"Plan.from_scheduler: {name}.{self.method} needs {missing}; "
                "pass them in step=dict(...)"
            )
        self._check_grid()

    def _check_grid(self) -> None:
        for key in ("sigmas", "timesteps"):
            grid = self.set_timesteps.get(key)
            if grid is not None and len(grid) not in (self.steps, self.steps + 1):
                raise ValueError(
                    f"Plan.from_scheduler: num_inference_steps is {self.steps} but {key} has "
                    f"{len(grid)} values, expected {self.steps}, or one more with the end point"
                )

    def prepare(self, scheduler: Any) -> Any:
        """A copy of ``scheduler``, ready for the first step; the original is not touched."""
        ready = detached_copy(scheduler)
        arguments = {k: v for k, v in self.set_timesteps.items() if k != "device"}
        parameters = inspect.signature(ready.set_timesteps).parameters
        own_grid = any(arguments.get(key) is not None for key in ("sigmas", "timesteps"))
        count = parameters.get("num_inference_steps")
        if not own_grid or (count is not None and count.default is count.empty):
            arguments["num_inference_steps"] = self.steps
        ready.set_timesteps(**arguments)
        if hasattr(ready, "set_sigmas"):
            ready.set_sigmas(self.steps)
        if hasattr(ready, "set_begin_index"):
            ready.set_begin_index(self.begin_index)
        if not 0 <= self.begin_index < len(ready.timesteps):
            raise ValueError(
                f"Plan.from_scheduler: begin_index is {self.begin_index}, expected 0 to "
                f"{len(ready.timesteps) - 1}"
            )
        return ready


class SchedulerLoop:
    """One trajectory of a scheduler, called step by step as a pipeline calls it.

    Attributes:
        scheduler: A copy of its own.
        timesteps: The time of every model call, as the scheduler gives it.
    """

    def __init__(self, prepared: Any, request: Request) -> None:
        self.scheduler = detached_copy(prepared)
        self.name = type(prepared).__name__
        self.timesteps: Sequence[Tensor] = list(self.scheduler.timesteps)
        if self.name in _LISTS_END_POINT and float(self.timesteps[-1]) == 0:
            self.timesteps = self.timesteps[:-1]
        self.timesteps = self.timesteps[request.begin_index :]
        self._method = getattr(self.scheduler, request.method)
        self._parameters = inspect.signature(self._method).parameters
        self._step_arguments = dict(request.step)
        self._carried: dict[str, Any] = {k: None for k in _CARRIED if k in self._parameters}

    @property
    def initial_scale(self) -> float:
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def use_noise(self, sampler: object) -> None:
        """Replaces the scheduler's own noise source, where it has one (Brownian trees)."""
        if hasattr(self.scheduler, "noise_sampler"):
            self.scheduler.noise_sampler = sampler

    def model_input(self, k: int, x: Tensor) -> Tensor:  # [...] -> [...]
        """What the model reads at call ``k``."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        return self.scheduler.scale_model_input(x, self.timesteps[k])

    def step(self, k: int, u: Tensor, x: Tensor) -> Tensor:  # [...], [...] -> [...]
        """Calls the scheduler's step, and keeps what a pipeline would keep for it."""
        t = self.timesteps[k]
        values = {"u": u, "x": x, "t": t.expand(x.shape[0]) if self.name in _TIME_PER_ROW else t}
        arguments: dict[str, Any] = self._step_arguments | self._carried
        arguments |= {p: values[v] for p, v in _ARGUMENTS.items() if p in self._parameters}
        if "timestep_back" in self._parameters:
            arguments["timestep_back"] = self.timesteps[k - 1] if k else None
        if "return_dict" in self._parameters:
            arguments["return_dict"] = False
        result = self._method(**arguments)
        for key in self._carried:
            self._carried[key] = result[_CARRIED[key]]
        return result[0]

    def registers(self, shape: tuple[int, ...]) -> list[Leaf]:
        """Every latent-shaped tensor that the next step may read besides ``x``."""
        state = [*leaves(vars(self.scheduler), "self"), *leaves(self._carried, "carried")]
        return [leaf for leaf in state if _is_latent(leaf.value, shape)]


def _is_star(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _is_latent(value: object, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) == shape
