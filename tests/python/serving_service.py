"""A service on the bundled model, the plain pipeline beside it, and models that wait or fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from sidestep.serving import ImageRequest

PATIENCE = 300  # seconds, on a busy machine
LAST_BIT = 1
"""Of 255: a CPU's kernels sum in another order for another number of rows, and the engine steps in
fp32 where the scheduler multiplies coefficients first; 1e-5 of a pixel's range, so that a value
between two integers may be rounded to the other one."""


def solo(pipe: Any, request: ImageRequest, scheduler: Any = None) -> list[Image]:
    """What the plain pipeline makes of a request, without the service."""
    own = pipe.scheduler
    pipe.scheduler = own if scheduler is None else scheduler
    generators = [torch.Generator().manual_seed(request.seed + i) for i in range(request.n)]
    try:
        return pipe(
            [request.prompt] * request.n,
            negative_prompt=None
            if request.negative_prompt is None
            else [request.negative_prompt] * request.n,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=generators,
        ).images
    finally:
        pipe.scheduler = own


def difference(image: Image, other: Image) -> int:
    """Of two pictures, the largest of a value, of 255."""
    a, b = (np.asarray(each).astype(int) for each in (image, other))
    assert a.shape == b.shape
    return int(np.abs(a - b).max())


@contextmanager
def one_at_a_time(pipe: Any) -> Iterator[list[int]]:
    """A model whose output for an entry does not depend on the others; the sizes of its calls."""
    unet, sizes = pipe.unet, []
    forward = unet.forward

    def alone(sample: Any, timestep: Any, encoder_hidden_states: Any, **rest: Any) -> Any:
        sizes.append(len(sample))
        times = torch.as_tensor(timestep).expand(len(sample))
        outputs = [
            forward(sample[i : i + 1], times[i : i + 1], encoder_hidden_states[i : i + 1], **rest)
            for i in range(len(sample))
        ]
        if isinstance(outputs[0], tuple):
            return (torch.cat([output[0] for output in outputs]),)
        return type(outputs[0])(sample=torch.cat([output.sample for output in outputs]))

    unet.forward = alone
    try:
        yield sizes
    finally:
        del unet.forward


class Gate:
    """Stops the model before each call until it is let through; what it raises is chosen here."""

    def __init__(self, pipe: Any) -> None:
        self.sizes: list[int] = []
        self.errors: dict[int, BaseException] = {}  # by number of the call
        self._calls = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)
        self._hook = pipe.unet.register_forward_pre_hook(self._wait, with_kwargs=True)

    def _wait(self, _model: Any, args: Any, kwargs: Any) -> None:
        self.sizes.append(len(args[0] if args else kwargs["sample"]))
        self._arrived.release()
        assert self._calls.acquire(timeout=PATIENCE)
        if (error := self.errors.get(len(self.sizes))) is not None:
            raise error

    def arrive(self) -> None:
        """Waits until the model is about to be called."""
        assert self._arrived.acquire(timeout=PATIENCE)

    def let(self, calls: int) -> None:
        """Lets that many calls through."""
        self._calls.release(calls)

    def open(self) -> None:
        """Lets everything through from now on."""
        self._hook.remove()
        self._calls.release(1000)
