"""What goes into the engine and what comes out: requests, batches for the model, results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from sidestep.runtime.methods.criterion import Course, Method
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.plan import Noise, Plan
from sidestep.runtime.summary import Summary

OnStep = Callable[[int, Tensor, Sequence[int]], object]
Status = Literal["done", "cancelled", "failed"]


@dataclass(frozen=True, eq=False)
class Request:
    """A batch of images to make: n rows of one plan.

    What it holds belongs to the caller and is read until the result is there: leave it alone.

    Attributes:
        plan: The sampler.
        x: ``[n, *shape]``, unit noise times ``plan.initial_scale``.
        conditioning: Further arguments of the model: any nesting of lists, tuples and
            dictionaries. A tensor ``[G * n, ...]`` has a line for each branch of each row, branch
            by branch as a diffusers model call has them. Everything else goes to the model as it
            is, and only requests that hold the same object can share a model call.
        guidance: ``[G]`` or ``[K, G]`` weights, ``u = sum_g w_g u_g``: ``(1 - s, s)`` for
            [unconditional; conditional] at guidance scale s.
        method: Settings of a method that makes fewer calls, or None to call at every step.
        noise: For a stochastic plan: unit normal draws ``[K, J, n, *shape]``, or a function of the
            step and the draw that returns ``[n, *shape]``. It is called once for each, in order.
        on_step: Called ``on_step(k, x, rows)`` when some rows have taken step ``k``: ``x`` is
            ``[len(rows), *shape]`` float32, ``rows`` are their indices. Rows that skip are ahead
            of the others. With `SRDS`, ``k`` counts iterates and ``x`` is the present estimate of
            the result. It may submit and cancel; an exception ends this request.
        tag: Anything; comes back with the result.
        course: What the method is told of the trajectory, but for the number of rows and of steps;
            None for what the plan itself shows.
    """

    plan: Plan
    x: Tensor
    conditioning: Any = None
    guidance: Sequence[float] | Sequence[Sequence[float]] | Tensor = (1.0,)
    method: Method | SRDS | None = None
    noise: Noise | None = None
    on_step: OnStep | None = None
    tag: Any = None
    course: Course | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """One model call: an entry for each branch of each row in it, and padding.

    The model is to return ``[N, *shape]``, an output for each entry, in the engine's dtype. The
    entries beyond ``size`` repeat entry 0; their outputs are not looked at.

    Attributes:
        engine: The number of the engine that it belongs to.
        ticket: The number of this batch.
        size: Entries that are not padding.
        x: ``[N, *shape]``, scaled as the model expects it; N is one of the engine's buckets.
        t: ``[N]`` float32, the model's own time.
        conditioning: The structure of the requests' conditioning, its tensors ``[N, ...]``.
        requests: ``[N]`` the id of the request.
        rows: ``[N]`` the row in its request.
        branches: ``[N]`` the guidance branch.
        steps: ``[N]`` the step of its plan.
        coarse: ``[N]`` whether its output may be a rough one (`SRDS.exits`); empty for none.
    """

    engine: int
    ticket: int
    size: int
    x: Tensor
    t: Tensor
    conditioning: Any
    requests: tuple[int, ...]
    rows: tuple[int, ...]
    branches: tuple[int, ...]
    steps: tuple[int, ...]
    coarse: tuple[bool, ...] = ()

    def __len__(self) -> int:
        """N, padding included."""
        return len(self.requests)


@dataclass(frozen=True, eq=False)
class Result:
    """What became of a request.

    Attributes:
        id: What `Engine.submit` returned.
        status: ``"done"``, ``"cancelled"`` or ``"failed"``.
        x: ``[n, *shape]`` float32, the latents after the last step; None unless done.
        summary: What it cost and why, row by row, as far as it got.
        error: What it failed with, else None.
        tag: The request's.
    """

    id: int
    status: Status
    x: Tensor | None
    summary: Summary
    error: Exception | None
    tag: Any

    @property
    def nfe(self) -> tuple[float, ...]:
        """``[n]`` model evaluations of each row; all branches together count as one."""
        return self.summary.nfe

    @property
    def ticks(self) -> int:
        """Model calls that the request had a row in."""
        return self.summary.ticks


def guidance_weights(request: Request) -> tuple[tuple[float, ...], ...]:
    """``[K, G]``, or ``[1, G]`` where they are the same at every step.

    Raises:
        ValueError: The shape is neither ``[G]`` nor ``[K, G]``, or a weight is no finite number.
    """
    given, steps = request.guidance, len(request.plan)
    expected = f"expected [G] or [{steps}, G]"
    try:
        values = given.tolist() if isinstance(given, Tensor) else given
        weights = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Engine.submit: guidance is {given!r}, {expected} numbers") from error
    shape = weights.shape
    if len(shape) not in (1, 2) or shape[-1] == 0 or (len(shape) == 2 and shape[0] != steps):
        raise ValueError(f"Engine.submit: guidance has shape {list(shape)}, {expected}")
    for weight in weights.flat:
        if not -1e30 < weight < 1e30:
            raise ValueError(f"Engine.submit: guidance holds {weight}, expected finite weights")
    return tuple(map(tuple, np.atleast_2d(weights).tolist()))
