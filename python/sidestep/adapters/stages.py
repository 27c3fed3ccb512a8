"""A pipeline's call in three stages, so that requests of a server can share model calls.

    prepare   the pipeline's own call up to its last step, written down and answered with probes as
              the whole-trajectory driver does: a `Request` for an engine
    denoise   the engine's ticks; `call_model` is the model call of a batch
    decode    the pipeline's own call again, with the latents from the engine in the place of its
              loop's: its pictures

No pipeline code is copied: texts are encoded, noise is drawn and latents are decoded by the
pipeline.  The model itself is called in `prepare` only for a shape it has not been seen with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sidestep.adapters.calibrated import refuse_other_pipeline
from sidestep.adapters.calling import own_size
from sidestep.adapters.capture import Call, CannotCapture, read_call
from sidestep.adapters.capture_layout import Layout
from sidestep.adapters.enable import Handle
from sidestep.adapters.refusals import refuse_unsuitable
from sidestep.adapters.stages_model import SharedArguments
from sidestep.adapters.trajectory import WholeTrajectory
from sidestep.adapters.trajectory_record import Trajectory
from sidestep.runtime.calibration import Calibration
from sidestep.runtime.denoisers import prediction
from sidestep.runtime.engine import Request
from sidestep.runtime.methods.criterion import Method
from sidestep.runtime.methods.early_exit import EarlyExit
from sidestep.runtime.methods.srds import SRDS

__all__ = ["Prepared", "Stages"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is known of a picture before its first model call.

    Attributes:
        request: For an engine.
        dtype: Of the model's inputs.
        arguments: What the pipeline is called with.
        seeds: Of the generators that it is called with.
        scheduler: The scheduler it has meanwhile.
        layout: Between the engine's latents and the pipeline's.
    """

    request: Request
    dtype: torch.dtype
    arguments: Mapping[str, Any]
    seeds: tuple[int, ...]
    scheduler: Any
    layout: Layout


class Stages:
    """Takes a pipeline's call apart. One thread at a time may use it, and the pipeline.

    Attributes:
        pipe: The pipeline; it is enabled until `close`.
    """

    def __init__(self, pipe: Any) -> None:
        """Attaches to the pipeline.

        Raises:
            ValueError: It is enabled already, or has no model or no scheduler.
        """
        self.pipe = pipe
        self._driver = _Driver()
        self._handle = _Handle(pipe, self._driver)
        self._shared = SharedArguments()
        self._own = pipe.scheduler
        self._unsuitable: dict[int, tuple[Any, str]] = {}  # an attached one hides its signature
        with suppress(ValueError):
            self._suit(self._own)
        self._handle._attach()

    def close(self) -> None:
        """Leaves the pipeline as it was. Once is enough, more does no harm."""
        self._handle.disable()
        self.pipe.scheduler = self._own

    def check_method(self, method: Method | SRDS | None) -> None:
        """Refuses a method that no request can have here.

        Raises:
            ValueError: It leaves within model calls, or was calibrated on another pipeline.
            TypeError: It is no method.
        """
        if method is None or isinstance(method, SRDS):
            return
        if isinstance(method, type) or not isinstance(method, Method):
            raise TypeError(f"method is {method!r}, expected settings such as sidestep.Adaptive()")
        if isinstance(method, EarlyExit):
            raise ValueError(
                "method is EarlyExit, which leaves within model calls; rows of a server share them"
            )
        path = getattr(method, "calibration", None)
        if path is not None:
            refuse_other_pipeline(self.pipe, Calibration.load(path))

    def _suit(self, scheduler: Any) -> None:
        """Raises ValueError unless step sizes measure something; asks a scheduler once."""
        if id(scheduler) not in self._unsuitable:
            reason = ""
            try:
                refuse_unsuitable(scheduler)
            except ValueError as error:
                reason = str(error)
            self._unsuitable[id(scheduler)] = (scheduler, reason)
        if reason := self._unsuitable[id(scheduler)][1]:
            raise ValueError(reason)

    def prepare(
        self,
        arguments: Mapping[str, Any],
        seeds: Sequence[int],
        *,
        method: Method | SRDS | None = None,
        scheduler: Any = None,
    ) -> Prepared:
        """The first stage.

        Args:
            arguments: Of the pipeline's call: prompt, num_inference_steps, ...; no generator.
            seeds: Of each picture.
            method: What makes fewer calls, or None.
            scheduler: In the place of the pipeline's own.

        Raises:
            ValueError: The pipeline refuses the arguments, or does what no batch of several
                requests can follow; one sentence says what.
        """
        if isinstance(method, Method):
            self._suit(self._own if scheduler is None else scheduler)
        scheduler = self._own if scheduler is None else scheduler
        given = {**own_size(self.pipe), **arguments}
        driver = self._driver
        driver.method, driver.latents = method, None
        try:
            self._call(given, scheduler, seeds, output_type="latent")
        except _Recorded as recorded:
            trajectory, noise = recorded.trajectory, recorded.noise
        else:
            raise CannotCapture("the pipeline returned without a step of its scheduler")
        request = Request(
            plan=trajectory.plan,
            x=trajectory.start.float(),
            conditioning=self._shared.of(trajectory),
            guidance=_weights(trajectory),
            method=method,
            noise=noise,
            course=trajectory.course,
        )
        first = trajectory.steps[0].calls[0].arguments
        return Prepared(request, first.dtype, given, tuple(seeds), scheduler, trajectory.layout)

    def call_model(
        self,
        x: Tensor,  # [N, ...] model dtype
        t: Tensor,  # [N] float32
        conditioning: Any,
    ) -> Tensor:  # [N, ...] model dtype
        """The model call of a batch, as `EngineLoop` wants it."""
        return self._shared.call(x, t, conditioning)

    def decode(
        self,
        prepared: Prepared,
        x: Tensor,  # [n, ...] float32
        output_type: str = "pil",
    ) -> Any:
        """The last stage: the pictures, as the pipeline returns them."""
        self._driver.latents = prepared.layout.outward(x)
        try:
            output = self._call(
                prepared.arguments, prepared.scheduler, prepared.seeds, output_type=output_type
            )
        finally:
            self._driver.latents = None
        return output.images

    def _call(
        self, given: Mapping[str, Any], scheduler: Any, seeds: Sequence[int], output_type: str
    ) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.pipe.scheduler = scheduler
        with torch.no_grad():
            return self.pipe(**given, generator=generators, output_type=output_type)


class _Handle(Handle):
    """What `enable` would make, with a driver of ours."""

    def __init__(self, pipe: Any, driver: _Driver) -> None:
        super().__init__(pipe, None, "whole")
        self._driver = driver


class _Recorded(Exception):
    """The pipeline has come to its last step, and is not needed any more."""

    def __init__(self, trajectory: Trajectory, noise: Any) -> None:
        super().__init__()
        self.trajectory, self.noise = trajectory, noise


class _Driver(WholeTrajectory):
    """Records a trajectory and stops there, or lets the loop pass and returns given latents.

    Attributes:
        latents: ``[S, ...]`` to return; None to record.
    """

    def __init__(self) -> None:
        super().__init__()
        self.latents: Tensor | None = None
        self._seen: dict[tuple[int, ...], Any] = {}

    def predict(self, model: Any, args: Any, kwargs: Any, **known: Any) -> Any:
        """While latents are given, something of the model's shape, else as recorded."""
        if self.latents is None:
            return super().predict(model, args, kwargs, **known)
        call = read_call(model, args, kwargs, {})
        return _filled(self._first(call, args, kwargs), len(call.sample))

    def step(
        self, scheduler: Any, given: Mapping[str, Any], announced: int | None = None
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """While latents are given, these."""
        if self.latents is None:
            return super().step(scheduler, given, announced)
        x = self.latents.to(given["sample"].dtype)
        return SchedulerOutput(prev_sample=x) if given.get("return_dict", True) else (x,)

    def _first(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's own output where it was not called with latents of that shape before."""
        key = tuple(call.sample.shape[1:])
        if key not in self._seen:
            self._seen[key] = super()._first(call, args, kwargs)
            call.output = None  # the engine makes this call again, with others
        return self._seen[key]

    def _run(self, trajectory: Trajectory, latents: Tensor, generator: Any) -> Tensor:
        trajectory.library.expect_unwritten()
        raise _Recorded(trajectory, trajectory.noise(latents, generator))


def _filled(kind: Any, batch: int) -> Any:
    """Zeros where the model's output was, for a batch of that size."""
    like = prediction(kind)
    return tree_map_only(
        Tensor,
        lambda leaf: leaf.new_zeros(batch, *leaf.shape[1:]) if leaf is like else leaf,
        kind,
    )


def _weights(trajectory: Trajectory) -> list[list[float]] | list[float]:  # [K][G] or [G]
    """Guidance weights; one list where they stay the same.

    Raises:
        CannotCapture: They are not one number for each branch.
    """
    count = len(trajectory.library.branches)
    if any(w.dim() for of in trajectory.weights for w in of.values()):
        raise CannotCapture("the pipeline has a guidance scale for every frame, expected one")
    if any(len(of) != count for of in trajectory.weights):
        raise CannotCapture(
            "the pipeline's guidance begins or ends on the way, expected the same calls at "
            "every step"
        )
    return [[float(of[b]) for b in range(count)] for of in trajectory.weights]
