"""Whether a pipeline is the one that a calibration holds for."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import torch
from torch import nn

from sidestep.runtime.calibration import Calibration
from sidestep.runtime.identity import weights_digest


def model_hash(pipe: Any) -> str:
    """Of the weights of all the pipeline's networks.

    Raises:
        ValueError: Some of them are not there to be read.
    """
    parts = pipe.components.items()
    return weights_digest({name: part for name, part in parts if isinstance(part, nn.Module)})


def model_dtype(pipe: Any) -> str:
    """The name of the pipeline's dtype."""
    return str(pipe.dtype).removeprefix("torch.")


def scheduler_record(scheduler: Any) -> dict[str, Any]:
    """Its class and all of its configuration, as JSON has it."""
    config = {k: v for k, v in sorted(dict(scheduler.config).items()) if not k.startswith("_")}
    record = {"class": type(scheduler).__name__, **config}
    plain: dict[str, Any] = json.loads(json.dumps(record, default=repr))
    return plain


def refuse_other_pipeline(pipe: Any, made: Calibration) -> None:
    """Refuses a pipeline that the promise does not hold for.

    Raises:
        ValueError: It has other weights or another scheduler.
    """
    if model_hash(pipe) != made.model_hash:
        raise ValueError(
            f"enable: the calibration was made for the model {made.model} in {made.dtype} (hash "
            f"{made.model_hash}), this pipeline's {model_dtype(pipe)} weights are others (hash "
            f"{model_hash(pipe)}); run `sidestep calibrate` for it, or give a threshold"
        )
    found = scheduler_record(pipe.scheduler)
    for key in [*made.scheduler, *found]:
        before, now = made.scheduler.get(key), found.get(key)
        if before != now:
            raise ValueError(
                f"enable: the calibration was made with a scheduler whose {key} is {before!r}, "
                f"this pipeline's is {now!r}; run `sidestep calibrate` for it, or give a threshold"
            )


def warn_of_other_course(made: Calibration, steps: int | None, guidance: float | None) -> None:
    """Warns where a generation has other numbers than the calibration's; None is not known."""
    others = []
    if steps is not None and steps != made.steps:
        others.append(f"{steps} steps and not {made.steps}")
    if guidance is not None and not math.isclose(guidance, made.guidance):
        others.append(f"guidance {guidance:g} and not {made.guidance:g}")
    if others:
        warnings.warn(
            f"this generation has {', '.join(others)}: the calibration's promise, "
            f"{made.promise}, was not tried there",
            stacklevel=2,
        )


def course_of_call(pipe: Any, scheduler: Any, calling: bool) -> tuple[int | None, float | None]:
    """Steps and guidance of the generation that begins, as far as the pipeline shows them."""
    steps = getattr(scheduler, "num_inference_steps", None)
    guidance = getattr(pipe, "_guidance_scale", None) if calling else None
    plain = guidance if isinstance(guidance, int | float) else None
    return (int(steps) if isinstance(steps, int | torch.Tensor) else None), plain
