"""Distances between pictures, per image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of each picture in dB; infinite for identical ones.

    Args:
        a: ``[N, 3, H, W]`` in [0, 1].
        b: ``[N, 3, H, W]`` in [0, 1], the reference.
    """
    _check(a, b)
    errors = (a.double() - b.double()).square().flatten(1).mean(1).tolist()
    return [math.inf if error == 0 else -10 * math.log10(error) for error in errors]


def ssim(a: Tensor, b: Tensor) -> list[float]:
    """Structural similarity of each picture (torchmetrics, data range 1).

    Args:
        a: ``[N, 3, H, W]`` in [0, 1].
        b: ``[N, 3, H, W]`` in [0, 1], the reference.
    """
    _check(a, b)
    values = structural_similarity_index_measure(
        a.float(), b.float(), data_range=1.0, reduction="none"
    )
    return torch.as_tensor(values).reshape(-1).tolist()


def latent_rms(a: Tensor, b: Tensor) -> list[float]:
    """Root mean square of the difference of each latent, ``[N, ...]`` each."""
    _check(a, b)
    return (a.double() - b.double()).square().flatten(1).mean(1).sqrt().tolist()


def mean_psnr(values: list[float], cap: float = 100.0) -> float:
    """The mean in dB with identical pictures counted at ``cap``, so that it stays finite."""
    return sum(min(value, cap) for value in values) / len(values) if values else math.nan


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not reach."""
    return sorted(values)[int(share * len(values))]


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"metrics: a has shape {list(a.shape)}, expected {list(b.shape)} as b")
