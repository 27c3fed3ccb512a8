"""A batch for a model that the host calls: what it gets, and what is said about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sidestep.runtime.engine_conditioning import gather
from sidestep.runtime.engine_request import Batch
from sidestep.runtime.engine_rows import Row
from sidestep.runtime.engine_state import EngineState
from sidestep.runtime.engine_step import Outputs
from sidestep.runtime.upload import select


def make_batch(
    state: EngineState,
    engine: int,
    ticket: int,
    rows: Sequence[Row],
    entries: Sequence[tuple[int, int]],
    size: int,
) -> Batch:
    """Gathers what the model gets.

    Args:
        state: Where the rows' registers are.
        engine: The number of the engine.
        ticket: The number of the batch.
        rows: That need the model.
        entries: Position among the rows, and branch, of each; padded.
        size: Entries that are not padding.
    """
    for row in rows:
        row.enter()
    members = [rows[position] for position, _ in entries]
    branches = tuple(branch for _, branch in entries)
    x, t = state.inputs(members)
    return Batch(
        engine=engine,
        ticket=ticket,
        size=size,
        x=x,
        t=t,
        conditioning=conditioning_of(members, branches),
        requests=tuple(row.live.id for row in members),
        rows=tuple(row.index for row in members),
        branches=branches,
        steps=tuple(row.step for row in members),
        coarse=tuple(row.coarse for row in members),
    )


def conditioning_of(rows: Sequence[Row], branches: Sequence[int]) -> Any:
    """The conditioning of a model call: of these rows, each in that branch."""
    return gather(
        [
            (row.live.conditioning, branch * row.live.count + row.index)
            for row, branch in zip(rows, branches, strict=True)
        ]
    )


def outputs_of(
    batch: Batch,
    output: Tensor,  # [N, *shape] model dtype
) -> Outputs:
    """The outputs of rows of the batch, branch by branch, once they have their positions in it."""
    # a copy where the output is a slice of more channels, or expanded
    flat = output.detach().reshape(len(batch), math.prod(output.shape[1:])).contiguous()
    starts = [batch.branches.index(g) for g in range(1 + max(batch.branches))]

    def outputs(rows: Sequence[Row]) -> list[Tensor]:
        G = max(row.live.branches for row in rows)
        return [select(flat, [row.place(starts, g) for row in rows]) for g in range(G)]

    return outputs
