"""Scratch memory of the GPU launchers, kept so that a step allocates nothing."""

from __future__ import annotations

import torch
from torch import Tensor

_kept: dict[tuple[str, int | None, int], Tensor] = {}


def scratch(
    name: str, device: torch.device, count: int, dtype: torch.dtype
) -> Tensor:  # [at least count]
    """Returns memory that was zero when it was allocated and is then left to the caller.

    It is kept per name, device and stream, because launches on one stream never overlap. A CUDA
    graph may be replayed on any stream, beside anything, so each call inside a capture takes memory
    of its own from the graph's pool.

    Args:
        name: What it is for; one name is always used in the same way.
        device: The current device, or the CPU (Triton's interpreter), where nothing is kept.
        count: The number of elements needed.
        dtype: Their type.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=dtype, device=device)
    key = (name, device.index, torch.cuda.current_stream().cuda_stream)
    kept = _kept.get(key)
    if kept is None or len(kept) < count:
        kept = _kept[key] = torch.zeros(2 * count, dtype=dtype, device=device)
    return kept
