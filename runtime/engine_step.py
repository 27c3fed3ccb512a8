"""One solver step of many rows, and what the requests' own code makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sidestep.runtime.engine_rows import Live, Row
from sidestep.runtime.engine_state import EngineState
from sidestep.runtime.upload import select

Outputs = Callable[[Sequence[Row]], Sequence[Tensor]]
"""Of n rows, the model's outputs or what stands for them: G of [n, D], model dtype."""


def take_step(
    state: EngineState,
    rows: Sequence[Row],  # n
    outputs: Outputs,
    end: Callable[[Live, Exception], None],
) -> None:
    """Steps these rows, tells those who listen, and decides the steps after.

    Args:
        state: Where the rows' registers are.
        rows: Of requests that have not ended.
        outputs: Is asked once, for the rows that do step.
        end: Ends one request with what its own code raised; the others go on.
    """
    noise = _draw(state, rows, end)
    rows = [row for row in rows if not row.live.ended]
    if not rows:
        return
    u, weights = outputs(rows), state.guidance(rows)
    for row in rows:
        row.record()
    adaptive = [i for i, row in enumerate(rows) if row.criterion is not None]
    fresh = [i for i in adaptive if rows[i].called[-1]]
    if fresh:
        state.keep([rows[i] for i in fresh], [_part(branch, fresh) for branch in u])
    deciding = [i for i in adaptive if rows[i].step + 1 < rows[i].live.steps]
    before = state.latents([rows[i] for i in deciding]) if deciding else None
    stats = state.step(rows, u, weights, [noise[row] for row in rows])
    _call_back(state, rows, end)
    if before is not None:
        sizes = stats[:, 0].to("cpu", copy=True)  # the one read of this step
        combined = combine([_part(branch, deciding) for branch in u], _part(weights, deciding))
        judged = [rows[i] for i in deciding]
        _decide(state, judged, before, combined.view(before.shape), sizes[deciding], end)


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
