"""Counts the bytes that diffusers' own DPM-Solver++ 2M step moves, operation by operation.

Eager PyTorch runs a kernel an operation, and each reads its operands from memory and writes its
result there: the traffic of a step is the sum over operations of the sizes of their tensors. What
is counted is the step that `sidestep bench step` times (`Theirs`) under a dispatch mode that sees
every operation; views move nothing, and scalars on the host are not of a latent's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sidestep.bench.step import Theirs, their_scheduler

D = 256  # elements of the latent that is counted on; a count is the same for any


@dataclass(frozen=True)
class Operation:
    """One operation on latents: bytes an element of the latent that it reads and writes."""

    name: str
    read: float
    written: float


class Count(TorchDispatchMode):
    """Writes down every operation on tensors as large as a latent, but no views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = _bytes((args, kwargs)), _bytes(out)
        if written and not func.is_view:
            name = func.overloadpacket.__name__.strip("_")
            self.operations.append(Operation(name, read / D, written / D))
        return out


def _bytes(tree: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors if t.numel() >= D)


def operations(dtype: torch.dtype, branches: int) -> list[Operation]:
    """The operations from the model's output to its next input, at a step of order two.

    Args:
        dtype: The model's.
        branches: 2 with guidance; 1 without, where nothing is combined or copied.
    """
    noise, output = torch.randn(1, D), torch.randn(2, D).to(dtype)
    theirs = Theirs(their_scheduler(), noise, output)
    for k in range(2):  # fills the history
        theirs.step(k)
    with Count() as count:
        if branches == 2:
            theirs.step(2)
            torch.cat([theirs.x] * 2)  # as pipelines make the next input
        else:
            t = theirs.scheduler.timesteps[2]
            theirs.scheduler.step(output[:1], t, theirs.x)
    return count.operations
