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
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def select(
    tensor: Tensor,  # [count, ...]
    lines: Sequence[int],
) -> Tensor:  # [n, ...]
    """``tensor[lines]``, without a copy where they follow each other."""
    first = lines[0]
    if list(lines) == list(range(first, first + len(lines))):
        return tensor[first : first + len(lines)]
    return tensor[upload(lines, torch.int64, tensor.device)]
