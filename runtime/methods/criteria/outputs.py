"""The last computed outputs of every row: what the criteria that read outputs compare.

Rows compute at different steps, so that everything kept is pushed row by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sidestep.runtime.methods.criterion import Observation
from sidestep.runtime.methods.reuse import HISTORY
from sidestep.runtime.upload import upload

_STEPS = max(HISTORY.values())
_CHUNK = 2048  # elements


class ComputedOutputs:
    """Copies of them, and the steps that they were computed at.

    Attributes:
        outputs: ``[rows, ...]`` fp32 each, newest first; as many as the row with most has, and in
            the other rows repeated.
        steps: ``[rows]``, the steps of each row's outputs, newest first.
    """

    def __init__(self, rows: int, count: int) -> None:
        """Begins with none.

        Args:
            rows: Rows of the trajectory.
            count: Outputs to keep of each.
        """
        self.count = count
        self.outputs: list[Tensor] = []
        self.steps: list[list[int]] = [[] for _ in range(rows)]

    def put(
        self,
        output: Tensor,  # [rows, ...] fp32
        seen: Observation,
    ) -> None:
        """Takes the output of the rows that have computed this step."""
        fresh = per_row(seen.computed, output)
        self.outputs = push(self.outputs, output, fresh)[: self.count]
        for steps, computed in zip(self.steps, seen.computed, strict=True):
            if computed:
                steps[:] = [seen.step, *steps[: _STEPS - 1]]

    def gaps(self, step: int) -> list[int]:
        """Steps from each row's newest output to ``step``, at least 1."""
        return [max(1, step - steps[0]) if steps else 1 for steps in self.steps]

    def combine(self, weights: Sequence[Sequence[float]]) -> Tensor:  # [rows, ...] fp32
        """``sum_i weights[row][i] * outputs[i]``; what a row has no weight for counts as 0."""
        terms = []
        for i, output in enumerate(self.outputs):
            share = [row[i] if i < len(row) else 0.0 for row in weights]
            terms.append(broadcast(per_row(share, output), output) * output)
        return torch.stack(terms).sum(0)


def push(
    kept: list[Tensor],  # [rows, ...] each, newest first
    new: Tensor,  # [rows, ...]
    fresh: Tensor,  # [rows] bool
) -> list[Tensor]:
    """Puts ``new`` before what is kept of the rows that are fresh; the others stay as they are."""
    mask = broadcast(fresh, new)
    stay = [*kept, kept[-1] if kept else new]
    return [torch.where(mask, n, o) for n, o in zip([new, *kept], stay, strict=True)]


def per_row(values: Sequence[float] | Sequence[bool], like: Tensor) -> Tensor:  # [rows]
    """One number or truth a row, on the device of ``like``."""
    truths = len(values) > 0 and isinstance(values[0], bool)
    return upload(values, torch.bool if truths else torch.float32, like.device)


def broadcast(values: Tensor, like: Tensor) -> Tensor:  # [rows] -> [rows, 1, ...]
    """One number a row in the shape in which it meets ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def row_sum(x: Tensor) -> Tensor:  # [rows, ...] -> [rows]
    """Sum over each row, of chunks first.

    On a CPU torch would split one long row over its threads, and several rows not: a row's bits
    would depend on how many there are.
    """
    flat = x.flatten(1)
    if flat.shape[1] % _CHUNK:
        flat = functional.pad(flat, (0, -flat.shape[1] % _CHUNK))
    return flat.view(len(x), -1, _CHUNK).sum(2).sum(1)
