"""What the engine refuses, each with one sentence, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.kernels.checks import MODEL_DTYPES
from sidestep.runtime.engine_request import Batch, Request
from sidestep.runtime.engine_rows import Live
from sidestep.runtime.methods.criterion import Method
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.plan import Plan


def check_settings(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    bounds: dict[str, tuple[int, int, int]],
) -> torch.device:
    """The device, with its index.

    Args:
        bounds: Settings by name: value, least and greatest.

    Raises:
        ValueError: A size is out of range, or the device is neither a CPU nor CUDA.
        TypeError: The model cannot have that dtype.
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"Engine: shape is {list(shape)}, expected dimensions of 1 or more")
    if dtype not in MODEL_DTYPES:
        raise TypeError(f"Engine: dtype is {dtype}, expected float32, float16 or bfloat16")
    for name, (value, least, greatest) in bounds.items():
        if not least <= value <= greatest:
            raise ValueError(f"Engine: {name} is {value}, expected {least} to {greatest}")
    found = torch.empty(0, device=device).device
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"Engine: device is {found}, expected a CPU or CUDA device")
    return found


def check_request(request: Request, shape: tuple[int, ...]) -> None:
    """Refuses what no engine of that latent shape can do.

    Raises:
        ValueError: The latents have a wrong shape, or a stochastic plan has no noise.
        TypeError: The plan or the method is none, or the latents are no floating point tensor.
    """
    if not isinstance(request.plan, Plan):
        raise TypeError(
            f"Engine.submit: plan is a {type(request.plan).__name__}, expected a sidestep.Plan"
        )
    if request.method is not None and not isinstance(request.method, Method | SRDS):
        raise TypeError(
            f"Engine.submit: method is a {type(request.method).__name__}, expected settings such "
            "as sidestep.Adaptive()"
        )
    x = request.x
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("Engine.submit: x is no tensor of floating point numbers")
    if x.ndim == 0 or tuple(x.shape[1:]) != shape or not len(x):
        expected = ", ".join(["n", *map(str, shape)])
        raise ValueError(
            f"Engine.submit: x has shape {list(x.shape)}, expected [{expected}] with n at least 1"
        )
    if request.plan.stochastic and request.noise is None:
        raise ValueError(
            f"Engine.submit: {request.plan.name} is stochastic, expected noise, got None"
        )


def check_live(live: Live, branches: int, history: int) -> None:
    """Refuses what needs more room than this engine has.

    Raises:
        ValueError: Too many guidance branches, or the method looks back on none or too many.
    """
    if live.branches > branches:
        raise ValueError(
            f"Engine.submit: guidance has {live.branches} branches, expected at most the engine's "
            f"{branches}"
        )
    criterion = live.rows[0].criterion
    if criterion is not None and not 1 <= criterion.history <= history:
        raise ValueError(
            f"Engine.submit: the method looks back on {criterion.history} outputs, "
            f"expected at least 1 and at most the engine's history of {history}"
        )


def check_batch(batch: Batch, engine: int, name: str) -> None:
    """Refuses a batch of another engine, whose ticket says nothing here.

    Raises:
        ValueError: It is one.
    """
    if batch.engine != engine:
        raise ValueError(
            f"Engine.{name}: the batch belongs to another engine, expected one of this engine's"
        )


def check_output(
    output: Tensor,  # [N, *shape] model dtype
    size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Refuses what is no output of a batch of ``size`` entries.

    Raises:
        ValueError: A wrong shape or device.
        TypeError: No tensor, or a wrong dtype.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"Engine.complete: output is a {type(output).__name__}, expected a tensor; a model "
            "that returns a tuple or an object has it inside"
        )
    if tuple(output.shape) != (size, *shape):
        raise ValueError(
            f"Engine.complete: output has shape {list(output.shape)}, expected {[size, *shape]}"
        )
    if output.dtype != dtype:
        raise TypeError(f"Engine.complete: output has dtype {output.dtype}, expected {dtype}")
    if output.device != device:
        raise ValueError(f"Engine.complete: output is on {output.device}, expected {device}")
