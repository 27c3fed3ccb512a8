"""What a probed scheduler sees of torch: noise from a tape, and latents that stay in float64.

Schedulers draw their noise with ``torch.randn``, and many cast the latent to float32.  Both are
turned aside with a `TorchFunctionMode`, which acts on the calling thread only: nothing is patched,
and other threads of a server keep their own random numbers.  The scheduler's coefficients are not
touched: it computes them from its own tables, in its own precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Draw = Callable[[int], Tensor]

_CASTS = {
    torch.Tensor.to, torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16,
    torch.Tensor.type, torch.Tensor.type_as,
}  # fmt: skip


class ProbeTape(TorchFunctionMode):
    """While active, all unit noise comes from ``draw``, and float64 latents are not narrowed.

    Attributes:
        shape: The latent's shape; noise of another shape is an error.
        draw: ``draw(j) -> [...]``, the j-th noise tensor of the current step.
        count: Draws of the current step so far.
    """

    def __init__(self, shape: tuple[int, ...], draw: Draw) -> None:
        super().__init__()
        self.shape = shape
        self.draw = draw
        self.count = 0

    def noise(self, *_: object, **__: object) -> Tensor:
        """The next draw; it also stands in for the scheduler's ``noise_sampler``."""
        self.count += 1
        return self.draw(self.count - 1)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randn or func is torch.randn_like:
            return self._randn(args, kwargs)
        result = func(*args, **kwargs)
        if func in _CASTS and self._is_wide_latent(args[0]) and result.is_floating_point():
            return args[0]
        return result

    def _is_wide_latent(self, value: Tensor) -> bool:  # [..., C, H, W], latents or a stack of them
        return value.dtype == torch.float64 and value.shape[-3:] == self.shape[-3:]

    def _randn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        size = kwargs.get("size", args[0] if len(args) == 1 else args)
        shape = tuple(size.shape if isinstance(size, Tensor) else size)
        if shape != self.shape:
            raise ValueError(f"noise of shape {list(shape)} drawn for a {list(self.shape)} latent")
        return self.noise()
