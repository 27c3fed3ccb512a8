"""Small lists of numbers as tensors on the device, and as an index, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a tensor on ``device``; a copy from memory that is not pinned would sync."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    pinned = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True)
    return pinned.to(device, non_blocking=True)


def write_(target: Tensor, values: Sequence[Any]) -> None:
    """``values``, in any nesting, as all elements of a tensor, without waiting for its device."""
    on_gpu = target.device.type == "cuda"
    given = torch.tensor(values, dtype=target.dtype, device="cpu", pin_memory=on_gpu)
    target.copy_(given.view(target.shape), non_blocking=True)


def index(places: Sequence[int], device: torch.device) -> slice | Tensor:
    """Selects ``places`` of a tensor's first dimension: a slice where they follow each other.

    A tensor of indices keeps channels_last, which ``index_select`` does not.
    """
    first, last = places[0], places[-1] + 1
    if list(places) == list(range(first, last)):
        return slice(first, last)
    return upload(places, torch.int64, device)


def select(
    tensor: Tensor,  # [count, ...]
    lines: Sequence[int],
) -> Tensor:  # [n, ...]
    """``tensor[lines]``, without a copy where they follow each other."""
    return tensor[index(lines, tensor.device)]
