"""One solver step of many rows, and what the requests' own code makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.runtime import ranges
from sidestep.runtime.engine_rows import Live, Row
from sidestep.runtime.engine_state import EngineState
from sidestep.runtime.upload import select

Outputs = Callable[[Sequence[Row]], Sequence[Tensor]]
"""Of n rows, the model's outputs or what stands for them: G of [n, D], model dtype."""


@dataclass(frozen=True, eq=False)
class Taken:
    """A step that n rows have taken.

    Attributes:
        rows: Which.
        outputs: G of ``[n, D]`` model dtype, that they went by; none after several steps in one go.
        weights: ``[n, G]`` fp32, their guidance.
        stats: ``[n, 2]`` fp32: mean step size and mean error estimate, valid until the next step.
        steps: Taken in one go, at most as many as every row had `Row.foreseen`.
    """

    rows: Sequence[Row]
    outputs: Sequence[Tensor]
    weights: Tensor
    stats: Tensor
    steps: int = 1

    def combined(self, rows: Sequence[Row]) -> Tensor:  # [n', D] fp32
        """u = sum_g w_g u_g of some of them."""
        G, at = max(row.live.branches for row in rows), [self.rows.index(row) for row in rows]
        return combine([_part(u, at) for u in self.outputs[:G]], _part(self.weights, at)[:, :G])


Take = Callable[[Sequence[Row], Sequence[Tensor | None]], Taken]
"""Takes the step of n rows with their noise, ``[D]`` fp32 each or None."""


@dataclass(frozen=True, eq=False)
class Tick:
    """Rows that need one model call and one step.

    Attributes:
        state: Where their registers are.
        rows: Those with the most branches first.
        noise: ``[D]`` fp32 of each, or None.
        entries: N, the size of the model call.
        foreseen: Steps that may be taken in one go: all rows have the model to themselves so long.
    """

    state: EngineState
    rows: Sequence[Row]
    noise: Sequence[Tensor | None]
    entries: int
    foreseen: int

    def by(self, evaluate: Callable[[Tick], Taken]) -> Taken:
        """What ``evaluate`` makes of it: a model call and a step, perhaps in one graph."""
        for row in self.rows:
            row.enter()
        with ranges.within("tick"):
            return evaluate(self)


def by_outputs(state: EngineState, outputs: Outputs) -> Take:
    """The step of rows whose outputs are there."""

    def take(rows: Sequence[Row], noise: Sequence[Tensor | None]) -> Taken:
        u, weights = outputs(rows), state.guidance(rows)
        with ranges.within("step"):
            return Taken(rows, u, weights, state.step(rows, u, weights, noise))

    return take


def take_step(
    state: EngineState,
    rows: Sequence[Row],  # n
    take: Take,
    end: Callable[[Live, Exception], None],
) -> Taken | None:
    """Steps these rows, tells those who listen, and decides the steps after.

    Args:
        state: Where the rows' registers are.
        rows: Of requests that have not ended.
        take: Is called once, with the rows that do step, unless there are none.
        end: Ends one request with what its own code raised; the others go on.

    Returns:
        What it returned.
    """
    noise = _draw(state, rows, end)
    rows = [row for row in rows if not row.live.ended]
    if not rows:
        return None
    adaptive = [row for row in rows if row.criterion is not None]
    deciding = [row for row in adaptive if row.step + 1 < row.live.steps]
    before = state.latents(deciding) if deciding else None
    taken = take(rows, [noise[row] for row in rows])
    for row in rows:
        row.record()
    fresh = [i for i, row in enumerate(rows) if row.criterion is not None and row.called[-1]]
    if fresh:
        state.keep([rows[i] for i in fresh], [_part(branch, fresh) for branch in taken.outputs])
    _call_back(state, rows, end)
    if before is not None:
        sizes = taken.stats[:, 0].to("cpu", copy=True)  # the one read of this step
        sizes = sizes[[rows.index(row) for row in deciding]]
        output = taken.combined(deciding).view(before.shape)
        with ranges.within("decide"):
            _decide(state, deciding, before, output, sizes, end)
    return taken


def foreseen(rows: Sequence[Row], counts: dict[str, int]) -> int:
    """Steps that the rows of a batch will take together, with no other row beside them.

    Args:
        rows: All rows of the batch, which is out.
        counts: Of the row scheduler.
    """
    alone = counts["ready"] == 0 and counts["in_flight"] == len(rows)
    return min(row.foreseen for row in rows) if alone else 1


def by_request(rows: Iterable[Row]) -> list[tuple[Live, list[Row]]]:
    """The rows of each request that has not ended, in order."""
    members: dict[Live, list[Row]] = {}
    for row in rows:
        if not row.live.ended:
            members.setdefault(row.live, []).append(row)
    return list(members.items())


def _draw(
    state: EngineState, rows: Sequence[Row], end: Callable[[Live, Exception], None]
) -> dict[Row, Tensor | None]:
    """The noise of each row, ``[D]`` or None."""
    noise: dict[Row, Tensor | None] = {}
    for live, members in by_request(rows):
        try:
            noise |= {row: live.draw(row, state.device) for row in members}
        except Exception as error:
            end(live, error)
    return noise


def _call_back(
    state: EngineState, rows: Sequence[Row], end: Callable[[Live, Exception], None]
) -> None:
    """Tells the requests that listen, once for each step that some of their rows have taken."""
    for live, members in by_request(rows):
        on_step = live.request.on_step
        if on_step is None or live.parallel is not None:
            continue
        for step in sorted({row.step for row in members}):
            those = [row for row in members if row.step == step and not live.ended]
            if those:
                try:
                    on_step(step, state.latents(those), [row.index for row in those])
                except Exception as error:
                    end(live, error)


def _decide(
    state: EngineState,
    rows: Sequence[Row],  # n
    before: Tensor,  # [n, *shape] fp32
    output: Tensor,  # [n, *shape] fp32
    sizes: Tensor,  # [n] fp32, on the CPU
    end: Callable[[Live, Exception], None],
) -> None:
    """Lets the criteria see the step; latents that are not finite end their request."""
    after = state.latents(rows)
    seen = zip(rows, before.split(1), after.split(1), output.split(1), sizes.split(1), strict=True)
    for (row, *observed), size in zip(seen, sizes.tolist(), strict=True):
        if row.live.ended:
            continue
        try:
            if not math.isfinite(size):
                raise FloatingPointError(
                    f"row {row.index} at step {row.step}: the latents are not finite"
                )
            row.observe(*observed)
        except Exception as error:
            end(row.live, error)


def _part(
    tensor: Tensor,  # [count, ...]
    index: list[int],
) -> Tensor:  # [n, ...]
    return tensor if len(index) == len(tensor) else select(tensor, index)


def combine(
    outputs: Sequence[Tensor],  # G of [n, D] model dtype
    weights: Tensor,  # [n, G] fp32
) -> Tensor:  # [n, D] fp32
    """u = sum_g w_g u_g."""
    total = outputs[0].to(torch.float32) * weights[:, 0, None]
    for g, output in enumerate(outputs[1:], start=1):
        total += output.to(torch.float32) * weights[:, g, None]
    return total
