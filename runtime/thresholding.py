"""Dynamic thresholding of the data prediction: the one non-linear stage a plan may have.

Source: Imagen (Saharia et al. 2022), section 2.3; DPM-Solver++ (Lu et al. 2022), Appendix C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DynamicThreshold:
    """Clips ``x0`` per sample to its own quantile ``s`` and divides by it.

    ``s = clamp(quantile(|x0|, ratio), minimum, maximum)``;  ``x0' = clamp(x0, -s, s) / s``.

    Attributes:
        ratio: The quantile, in (0, 1].
        minimum: The smallest ``s``; 1 keeps pictures that are in range as they are.
        maximum: The largest ``s``, or None for no limit as published. diffusers'
            ``sample_max_value`` is this limit; at its default of 1 it is a plain clip to [-1, 1].

    Raises:
        ValueError: A number is out of its range.
    """

    ratio: float = 0.995
    minimum: float = 1.0
    maximum: float | None = None

    def __post_init__(self) -> None:
        for name in ("ratio", "minimum", "maximum"):
            if name != "maximum" or self.maximum is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        if not 0 < self.ratio <= 1:
            raise ValueError(f"DynamicThreshold: ratio is {self.ratio}, expected 0 < ratio <= 1")
        highest = math.inf if self.maximum is None else self.maximum
        if not (0 < self.minimum < math.inf and self.minimum <= highest):
            raise ValueError(
                f"DynamicThreshold: minimum is {self.minimum} and maximum {self.maximum}, "
                "expected 0 < minimum <= maximum"
            )

    def __call__(self, x0: Tensor) -> Tensor:  # [B, ...] -> [B, ...]
        """Applies the stage; the quantile is taken in float32 or wider."""
        wide = x0 if x0.dtype == torch.float64 else x0.float()
        s = torch.quantile(wide.abs().flatten(1), self.ratio, dim=1).clamp(min=self.minimum)
        if self.maximum is not None:
            s = s.clamp(max=self.maximum)
        s = s.view(-1, *[1] * (x0.dim() - 1))
        return (wide.clamp(-s, s) / s).to(x0.dtype)
