"""What a scheduler knows of the steps that a pipeline is about to take."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sidestep.adapters.refusals import adds_noise
from sidestep.runtime.methods.criterion import Course
from sidestep.runtime.plan_course import rising
from sidestep.runtime.predictions import PREDICTIONS
from sidestep.runtime.scheduler_snr import log_snr

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def course_of(
    scheduler: SchedulerMixin, timestep: float | Tensor, announced: int | None = None
) -> Course:
    """The steps from ``timestep``, where a pipeline takes its first one, to its last.

    An image-to-image pipeline leaves out the first timesteps, and says so only by where it begins.

    Args:
        scheduler: After ``set_timesteps``.
        timestep: Of the first step.
        announced: The number of steps that the pipeline itself gives, if it does: it may end before
            the last timestep.

    Returns:
        The course of no rows yet.
    """
    unknown = Course(
        prediction=_prediction(scheduler),
        multistep=_is_multistep(scheduler),
        noise=adds_noise(scheduler),
    )
    times = getattr(scheduler, "timesteps", None)
    if not isinstance(times, Tensor) or times.ndim != 1:
        return unknown
    timesteps = times.detach().cpu().double().numpy()
    first = _first_index(scheduler, timesteps, timestep)
    if first is None:
        return unknown
    ours = getattr(scheduler, "log_snr", None)  # SidestepScheduler knows its own
    known = ours[first:] if ours is not None else _log_snr(scheduler, timesteps[first:], first)
    steps = min(len(timesteps) - first, announced or len(timesteps))
    return replace(unknown, steps=steps, log_snr=rising(None if known is None else known[:steps]))


def _prediction(scheduler: SchedulerMixin) -> str | None:
    """What the model predicts, a name of `sidestep.runtime.predictions`."""
    config: Any = getattr(scheduler, "config", {})
    name = type(scheduler).__name__
    if name.startswith("EDM"):  # a network with preconditioning around it
        return "edm" if config.get("sigma_data") == 0.5 else None
    if name.startswith("FlowMatch"):
        return "flow_prediction"
    prediction = config.get("prediction_type")
    return prediction if prediction in PREDICTIONS else None


def _is_multistep(scheduler: SchedulerMixin) -> bool:
    """Whether the solver steps with outputs of earlier steps: as `plan_course` sees in a plan."""
    plan = getattr(scheduler, "plan", None)  # SidestepScheduler's own
    if plan is not None and getattr(scheduler, "num_inference_steps", None):
        return plan().registers > 1
    if any(hasattr(scheduler, name) for name in ("ets", "derivatives")):  # PNDM, iPNDM; LMS
        return True
    config: Any = getattr(scheduler, "config", {})
    uncorrected = getattr(scheduler, "disable_corrector", None)  # UniPC's: steps without it
    if uncorrected is not None:
        steps = getattr(scheduler, "num_inference_steps", None) or 0
        if not set(range(steps - 1)) <= set(uncorrected):
            return True  # a corrector steps again, with the output before
    return hasattr(scheduler, "model_outputs") and config.get("solver_order", 1) > 1


def _first_index(
    scheduler: SchedulerMixin, timesteps: np.ndarray, timestep: float | Tensor
) -> int | None:
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if index is not None and index < len(timesteps):
            return int(index)
    found = np.flatnonzero(
        timesteps == np.float64(float(torch.as_tensor(timestep, device="cpu").flatten()[0]))
    )
    return int(found[0]) if len(found) else None


def _log_snr(scheduler: SchedulerMixin, timesteps: np.ndarray, first: int) -> np.ndarray | None:
    """Asks a shallow copy for the scales of the model's input, so that nothing is changed."""
    twin: Any = copy.copy(scheduler)
    scales = np.ones(len(timesteps))
    if hasattr(twin, "scale_model_input") and hasattr(twin, "_step_index"):
        for k in range(len(timesteps)):
            twin._step_index = first + k
            one = twin.scale_model_input(
                torch.ones((), dtype=torch.float64, device="cpu"), twin.timesteps[k]
            )
            scales[k] = float(one)
    return log_snr(scheduler, timesteps, scales, first)
