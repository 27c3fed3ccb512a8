"""What every check of an operator's arguments is made of: one sentence for each thing wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor


def check(
    operation: str,
    tensors: Mapping[str, tuple[Tensor, tuple[int, ...]]],
    beside: tuple[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Refuses what is not contiguous of its shape and dtype, on the device of `beside`.

    Without `beside` the first of them says what the device is.
    """
    like, first = beside or next((name, tensor) for name, (tensor, _) in tensors.items())
    device = first.device
    for name, (tensor, shape) in tensors.items():
        if (
            tensor.shape != shape
            or tensor.dtype is not dtype
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            refuse(operation, name, tensor, shape, dtype, like, device)


def refuse_overlap(
    operation: str, written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]
) -> None:
    """Refuses what is written where something else lies."""
    spans = [
        (name, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for name, tensor in [*written.items(), *read.items()]
        if tensor is not None and tensor.nbytes > 0
    ]
    for i, (name, start, end) in enumerate(spans):
        for other, other_start, other_end in spans[i + 1 :]:
            if name in written and start < other_end and other_start < end:
                raise ValueError(
                    f"{operation}: {name} overlaps {other} in memory, expected separate tensors"
                )


def refuse(
    operation: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    like: str,
    device: torch.device,
) -> NoReturn:
    """Says what is wrong with a tensor: its shape, dtype, device or layout."""
    if tensor.shape != shape:
        refuse_shape(operation, name, tensor, str(list(shape)))
    if tensor.dtype is not dtype:
        raise TypeError(f"{operation}: {name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.device != device:
        raise ValueError(
            f"{operation}: {name} is on {tensor.device}, expected {device} like {like}"
        )
    raise ValueError(
        f"{operation}: {name} has strides {list(tensor.stride())}, expected a contiguous tensor"
    )


def refuse_shape(operation: str, name: str, tensor: Tensor, expected: str) -> NoReturn:
    """Says what a shape is and should be."""
    raise ValueError(f"{operation}: {name} has shape {list(tensor.shape)}, expected {expected}")
