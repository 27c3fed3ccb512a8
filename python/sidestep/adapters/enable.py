"""`enable`: a method on an unmodified diffusers pipeline, and off again.

Three objects are attached to, all in the same way (`sidestep.adapters.swap`): the pipeline, whose
call is the moment to look whether its model or scheduler has been replaced; the model, whose call
the driver stands for; the scheduler, whose ``set_timesteps`` begins a generation and whose ``step``
shows the latents.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sidestep.adapters.refusals import NoiseGuard, refuse_unsuitable
from sidestep.adapters.swap import owner_of, restore, swap
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.stepwise import Stepwise
from sidestep.runtime.summary import Summary

if TYPE_CHECKING:
    from types import TracebackType

    from diffusers import DiffusionPipeline

__all__ = ["Handle", "Summary", "disable", "enable"]

_MODEL_NAMES = ("unet", "transformer")


def enable(pipe: DiffusionPipeline, method: Adaptive | None = None) -> Handle:
    """Runs ``pipe`` with a method from now on.

        with sidestep.enable(pipe, sidestep.Adaptive(threshold=0.01)) as handle:
            images = pipe("frog on a bicycle").images
        print(handle.summary())

    Args:
        pipe: A pipeline with a ``unet`` or ``transformer`` and a deterministic ``scheduler``.
        method: Its settings; the default `Adaptive` if None.

    Returns:
        The handle that turns it off, also as a context manager, and that has the summary.

    Raises:
        ValueError: The pipeline is enabled already, shares its model with one that is, or has a
            scheduler under which the method means nothing.
        TypeError: ``method`` is not the settings of a method.
    """
    method = Adaptive() if method is None else method
    if not isinstance(method, Adaptive):
        raise TypeError(f"enable: method is {method!r}, expected sidestep.Adaptive(...)")
    handle = Handle(pipe, method)
    handle._attach()
    return handle


def disable(pipe: DiffusionPipeline) -> None:
    """Leaves ``pipe`` as `enable` found it.

    Raises:
        ValueError: The pipeline is not enabled.
    """
    handle = owner_of(pipe)
    if handle is None:
        raise ValueError("disable: this pipeline is not enabled")
    handle.disable()


class Handle:
    """A method that is on; `enable` makes it.

    Attributes:
        method: The settings.
        active: False once it was disabled.
    """

    def __init__(self, pipe: DiffusionPipeline, method: Adaptive) -> None:
        """Prepares; nothing is touched yet."""
        self.method = method
        self.active = False
        self._pipe: Any = pipe
        self._model_name = _model_name(pipe)
        self._driver = Stepwise(method.criterion(), method=repr(method))
        self._attached: list[Any] = []

    def disable(self) -> None:
        """Leaves the pipeline as `enable` found it. Once is enough, more does no harm."""
        self.active = False
        for obj in self._attached:
            restore(obj)
        self._attached.clear()
        self._driver.release()

    def summary(self) -> Summary:
        """Model calls per image, the skip map and the reasons of the last generation."""
        return self._driver.summary()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.disable()

    def _wanted(self) -> list[tuple[Any, Callable[[Handle, Any], dict[str, Callable[..., Any]]]]]:
        return [
            (self._pipe, _pipeline_overrides),
            (getattr(self._pipe, self._model_name), _model_overrides),
            (self._pipe.scheduler, _scheduler_overrides),
        ]

    def _attach(self) -> None:
        """Attaches to what the pipeline holds now, and lets go of what it no longer holds."""
        wanted = self._wanted()
        new = [pair for pair in wanted if not self._has(pair[0])]
        for obj, _ in new:
            _refuse_owned(obj)
        if not self._has(self._pipe.scheduler):
            refuse_unsuitable(self._pipe.scheduler)
        for obj in self._attached:
            if not any(obj is kept for kept, _ in wanted):
                restore(obj)
        self._attached = [obj for obj, _ in wanted]
        for obj, overrides in new:
            restore(obj)  # a copy of an attached object carries the class of another handle
            follow = overrides is _scheduler_overrides
            swap(obj, self, overrides(self, type(obj)), copies_follow=follow)
        self.active = True

    def _has(self, obj: Any) -> bool:
        return any(obj is attached for attached in self._attached)

    def _begin(self, steps: int | None = None) -> None:
        """A generation begins, with whatever model and scheduler the pipeline has by now."""
        self._attach()
        self._driver.begin(steps)


def _pipeline_overrides(handle: Handle, plain: Any) -> dict[str, Callable[..., Any]]:
    call_pipeline = plain.__call__

    def __call__(pipe: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        if not handle.active:
            return call_pipeline(pipe, *args, **kwargs)
        handle._begin()
        try:
            return call_pipeline(pipe, *args, **kwargs)
        finally:
            handle._driver.release()

    return {"__call__": __call__}


def _model_overrides(handle: Handle, plain: Any) -> dict[str, Callable[..., Any]]:
    call_model = plain.__call__

    def __call__(model: Any, *args: Any, **kwargs: Any) -> Any:
        if type(model) is plain or not handle.active:  # torch.compile keeps bound methods
            return call_model(model, *args, **kwargs)
        if not handle._has(handle._pipe.scheduler):  # replaced, and its set_timesteps unseen
            handle._begin()
        return handle._driver.predict(functools.partial(call_model, model), args, kwargs)

    return {"__call__": __call__}


def _scheduler_overrides(handle: Handle, plain: Any) -> dict[str, Callable[..., Any]]:
    take_step = plain.step
    plan_steps = plain.set_timesteps
    position = list(inspect.signature(take_step).parameters).index("sample") - 1

    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if not handle.active:
            return take_step(scheduler, *args, **kwargs)
        x: Tensor = kwargs["sample"] if "sample" in kwargs else args[position]
        guard = NoiseGuard(scheduler, kwargs.get("generator"), x.device)
        output = take_step(scheduler, *args, **kwargs)
        guard.check()
        x_next = output[0] if isinstance(output, tuple) else output.prev_sample
        delta = getattr(scheduler, "step_sizes", None)  # SidestepScheduler's kernel forms them
        handle._driver.observe(x, x_next, delta)
        return output

    def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        result = plan_steps(scheduler, *args, **kwargs)
        if handle.active:
            handle._begin(len(scheduler.timesteps))
        return result

    return {"step": step, "set_timesteps": set_timesteps}


def _model_name(pipe: DiffusionPipeline) -> str:
    """The attribute under which the pipeline keeps the network that it calls at every step.

    Raises:
        ValueError: There is none, or no scheduler.
    """
    if getattr(pipe, "scheduler", None) is None:
        raise ValueError(f"enable: {type(pipe).__name__} has no scheduler")
    for name in _MODEL_NAMES:
        if getattr(pipe, name, None) is not None:
            return name
    raise ValueError(
        f"enable: {type(pipe).__name__} has none of {', '.join(_MODEL_NAMES)} to stand for"
    )


def _refuse_owned(obj: Any) -> None:
    """Raises ValueError if another handle, or this one through another pipeline, holds ``obj``."""
    other = owner_of(obj)
    if other is not None and other.active and other._has(obj):
        raise ValueError(
            f"enable: {type(obj).__name__} is enabled already; disable it first "
            "(a pipeline that shares its model or scheduler counts)"
        )
