"""What `enable` attaches to, why, and what it does there: one table, one override for each role.

Everything is attached in the same way, by giving an object a subclass of its own class
(`sidestep.adapters.swap`); hooks of other libraries stay below it, whatever their order.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sidestep.adapters.attach_course import course_of
from sidestep.adapters.capture_layout import is_doubled
from sidestep.adapters.refusals import NoiseGuard
from sidestep.adapters.swap import restore
from sidestep.adapters.trajectory import WholeTrajectory
from sidestep.runtime.exits.layouts import Blocks, Layout
from sidestep.runtime.stepwise import Stepwise

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from sidestep.adapters.enable import Handle

Overrides = dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class Part:
    """One attribute of a pipeline that is attached to."""

    name: str  # empty for the pipeline itself
    role: str
    why: str


@dataclass(frozen=True)
class BlockPart(Part):
    """One block of a transformer that rows may leave early."""

    index: int
    blocks: Blocks


PARTS = (
    Part(
        "", "pipeline",
        "its call begins a generation, whatever was replaced since the last one, and ends it, "
        "whatever happened in it",
    ),
    Part("unet", "model", "it is not called for the rows that skip"),
    Part("transformer", "model", "it is not called for the rows that skip"),
    Part("transformer_2", "model", "it takes over below some noise level (Wan 2.2)"),
    Part(
        "controlnet", "assistant",
        "only the model reads what it returns, so that it is not called either",
    ),
    Part(
        "scheduler", "scheduler",
        "set_timesteps begins a generation in a loop of one's own, step shows the latents",
    ),
)  # fmt: skip
"""The table. A pipeline needs a model and a scheduler; of the rest it may have any."""

_STEPS_BRANCHES = ("DiTPipeline",)
"""Pipelines whose scheduler steps the doubled batch: the branches are equal copies of the rows."""


def parts_of(pipe: DiffusionPipeline) -> list[tuple[Part, Any]]:
    """What the pipeline has of the table.

    Raises:
        ValueError: It has no model, or no scheduler.
    """
    held = [(part, getattr(pipe, part.name, None) if part.name else pipe) for part in PARTS]
    found = [(part, obj) for part, obj in held if obj is not None]
    roles = {part.role for part, _ in found}
    if "scheduler" not in roles:
        raise ValueError(f"enable: {type(pipe).__name__} has no scheduler")
    if "model" not in roles:
        names = ", ".join(part.name for part in PARTS if part.role == "model")
        raise ValueError(f"enable: {type(pipe).__name__} has none of {names} to stand for")
    return found


def blocks_of(model: Any, layout: Layout) -> list[tuple[Part, Any]]:
    """Every block of a transformer, in order: rows may leave after it."""
    why = "rows leave after it"
    return [
        (BlockPart(f"block {i}", "block", why, index=i, blocks=blocks), block)
        for i, (blocks, block) in enumerate(layout.of(model))
    ]


def overrides_of(handle: Handle, part: Part, plain: Any) -> Overrides:
    """The methods that an object of class ``plain`` gets, for its part in the table."""
    if isinstance(part, BlockPart):
        return block_overrides(handle, part, plain)
    if part.role == "pipeline":
        return _of_pipeline(handle, plain)
    if part.role == "scheduler":
        return _of_scheduler(handle, plain)
    return _of_network(handle, plain, part)


def is_compiled(model: Any) -> bool:
    """Whether the model, or a block of it, is compiled: a new batch size is then costly."""
    from torch._dynamo import OptimizedModule

    if not isinstance(model, nn.Module):
        return False
    return isinstance(model, OptimizedModule) or any(
        module._compiled_call_impl is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def _of_pipeline(handle: Handle, plain: Any) -> Overrides:
    call_pipeline = plain.__call__

    def __call__(pipe: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        if not handle.active:
            return call_pipeline(pipe, *args, **kwargs)
        handle._begin()
        handle._calling = True
        try:
            output = call_pipeline(pipe, *args, **kwargs)
            if isinstance(handle._driver, WholeTrajectory):
                handle._driver.finish()
        finally:
            handle._calling = False
            handle._driver.release()
        return output

    def __deepcopy__(pipe: Any, memo: dict[int, Any]) -> Any:
        twin = memo[id(pipe)] = object.__new__(plain)
        twin.__dict__.update(copy.deepcopy(pipe.__dict__, memo))
        for obj in list(vars(twin).values()):
            restore(obj)  # a scheduler's copy follows the original, but not into another pipeline
        return twin

    return {"__call__": __call__, "__deepcopy__": __deepcopy__}


def block_overrides(holder: Any, part: BlockPart, plain: Any) -> Overrides:
    """A block's call goes through the passage of ``holder``, while it has one."""
    call_block = plain.__call__

    def __call__(block: Any, *args: Any, **kwargs: Any) -> Any:
        passage = holder.passage
        if passage is None:
            return call_block(block, *args, **kwargs)
        call = functools.partial(call_block, block)
        return passage.through(part.index, part.blocks, call, args, kwargs)

    return {"__call__": __call__}


def _of_network(handle: Handle, plain: Any, part: Part) -> Overrides:
    call_model = plain.__call__

    def __call__(model: Any, *args: Any, **kwargs: Any) -> Any:
        if type(model) is plain or not handle.active:  # torch.compile keeps bound methods
            return call_model(model, *args, **kwargs)
        if not handle._has(handle._pipe.scheduler):  # replaced, and its set_timesteps unseen
            handle._begin()
        driver, call = handle._driver, functools.partial(call_model, model)
        if isinstance(driver, Stepwise) and driver.unplanned and "timestep" in kwargs:
            announced = _announced(handle)
            driver.plan(course_of(handle._pipe.scheduler, kwargs["timestep"], announced))
        stand_in = driver.assist if part.role == "assistant" else driver.predict
        key = (part.name, handle._branch)
        return stand_in(call, args, kwargs, key=key, compiled=part.name in handle._compiled)

    @contextmanager
    def cache_context(model: Any, name: str, **kwargs: Any) -> Iterator[None]:
        outside, handle._branch = handle._branch, name
        try:
            with plain.cache_context(model, name, **kwargs):
                yield
        finally:
            handle._branch = outside

    if hasattr(plain, "cache_context"):  # diffusers' name of the guidance branch
        return {"__call__": __call__, "cache_context": cache_context}
    return {"__call__": __call__}


def _of_scheduler(handle: Handle, plain: Any) -> Overrides:
    take_step = plain.step
    plan_steps = plain.set_timesteps
    signature = inspect.signature(take_step)

    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if not handle.active:
            return take_step(scheduler, *args, **kwargs)
        given = signature.bind(scheduler, *args, **kwargs).arguments
        x: Tensor = given["sample"]
        driver = handle._driver
        announced = _announced(handle)
        if isinstance(driver, WholeTrajectory):
            return driver.step(scheduler, given, announced)
        _refuse_views(handle, given["timestep"], driver.called)
        first = not driver.stepped
        if first:
            driver.plan(course_of(scheduler, given["timestep"], announced))
        guard = (
            NoiseGuard(scheduler, given.get("generator"), x.device) if handle._measures else None
        )
        output = take_step(scheduler, *args, **kwargs)
        if guard is not None:
            guard.check()
        x_next = output[0] if isinstance(output, tuple) else output.prev_sample
        if first:
            handle._copies = _copies(handle._pipe, x_next)
        sizes = getattr(scheduler, "step_sizes", None)  # SidestepScheduler's kernel forms them
        driver.observe(x, x_next, given.get("model_output"), sizes, copies=handle._copies)
        return output

    def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        result = plan_steps(scheduler, *args, **kwargs)
        if handle.active:
            handle._begin()
            handle._check_course(scheduler)
            if isinstance(handle._driver, WholeTrajectory):
                handle._driver.plan(scheduler, args, kwargs)
        return result

    return {"step": step, "set_timesteps": set_timesteps}


def _announced(handle: Handle) -> int | None:
    """The number of steps that the pipeline itself gives, while it runs."""
    return getattr(handle._pipe, "_num_timesteps", None) if handle._calling else None


def _refuse_views(handle: Handle, timestep: Any, called: bool) -> None:
    """Raises ValueError where several pictures take the same step one after the other.

    Panoramas do so, view by view; what is held of one would be taken for the next. Compared are
    the objects, and nothing is read from a device; a timestep that a scheduler repeats is another.
    """
    if called and isinstance(timestep, Tensor) and timestep is handle._timestep:
        raise ValueError(
            f"enable: {type(handle._pipe).__name__} takes the same step twice, with a model call "
            "before each (views of one picture?), and they cannot be told apart; call disable first"
        )
    handle._timestep = timestep


def _copies(pipe: DiffusionPipeline, x: Tensor) -> int:
    """Equal copies of every latent in the scheduler's batch, seen after its first step."""
    return 2 if type(pipe).__name__ in _STEPS_BRANCHES and is_doubled(x) else 1
