"""Who leaves the network, and the moves, in Triton; `reference` says what they mean."""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidestep.kernels import checks_exits
from sidestep.kernels.triton_launch import check_device, check_version
from sidestep.kernels.workspace import scratch

check_version("exit_compact_")

ROWS = 1024  # a turn of the one program that decides
BLOCK = 2048  # elements of a move
NUM_WARPS = 4


@triton.jit
def exit_decide_kernel(
    score,  # [n] fp32
    limit,  # [n] fp32
    group,  # [n] int64 or None
    order,  # [n] int64, written
    kept,  # [1] int64, written
    stays,  # [n] int32, zero between launches: of groups
    n,
    ROWS: tl.constexpr,
):
    """One program: flags of groups, a count, the leaving rows, and then the holes' survivors."""
    for first in range(0, n, ROWS):
        r = first + tl.arange(0, ROWS)
        inside = r < n
        certain = tl.load(score + r, inside, other=0.0) <= tl.load(limit + r, inside, other=0.0)
        g, known = _group(group, r, n)
        tl.atomic_max(stays + g, 1, mask=inside & known & (certain == 0), scope="cta")
    tl.debug_barrier()
    count = 0
    for first in range(0, n, ROWS):
        r = first + tl.arange(0, ROWS)
        count += tl.sum(_staying(stays, group, r, n).to(tl.int32), 0)
    leaving = count
    for first in range(0, n, ROWS):
        r = first + tl.arange(0, ROWS)
        stay = _staying(stays, group, r, n)
        leave = (r < n) & (stay == 0)
        rank = tl.cumsum(leave.to(tl.int32), 0)
        tl.store(order + leaving + rank - 1, r.to(tl.int64), mask=leave)
        tl.store(order + r, r.to(tl.int64), mask=stay & (r < count))
        leaving += tl.sum(leave.to(tl.int32), 0)
    tl.debug_barrier()
    hole = count  # in order, whose first leaving rows are the holes
    for first in range(0, n, ROWS):
        r = first + tl.arange(0, ROWS)
        tail = _staying(stays, group, r, n) & (r >= count)
        rank = tl.cumsum(tail.to(tl.int32), 0)
        p = tl.load(order + hole + rank - 1, mask=tail, other=0)
        tl.store(order + p, r.to(tl.int64), mask=tail)
        hole += tl.sum(tail.to(tl.int32), 0)
    tl.store(kept, tl.cast(count, tl.int64))
    tl.debug_barrier()
    for first in range(0, n, ROWS):
        r = first + tl.arange(0, ROWS)
        tl.store(stays + r, 0, mask=r < n)


@triton.jit
def _group(group, r, n):
    """Each row's group, and whether there is such a one."""
    g = r.to(tl.int64)
    if group is not None:
        g = tl.load(group + r, mask=r < n, other=0)
    known = (g >= 0) & (g < n)
    return tl.where(known, g, 0), known


@triton.jit
def _staying(stays, group, r, n):
    """Whether each row stays: as its group does, or because it has none."""
    g, known = _group(group, r, n)
    flag = tl.load(stays + g, mask=(r < n) & known, other=1)
    return (r < n) & (flag != 0)


@triton.jit
def exit_compact_kernel(
    hidden,  # [n, E] model dtype, written
    out,  # [B, E] model dtype, written
    order,  # [n] int64
    kept,  # [1] int64
    place,  # [n] int64
    n,
    places,
    E,
    BLOCK: tl.constexpr,
):
    """One block of the two moves of one entry of order, if it leaves; grid: n * blocks."""
    blocks = tl.cdiv(E, BLOCK)
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    stay = tl.load(kept)
    if entry >= stay:
        e = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        r = tl.load(order + entry)
        valid = (r >= 0) & (r < n)
        p = tl.load(place + r, mask=valid, other=-1)
        size = tl.where(valid & (p >= 0) & (p < places), E, 0)  # a size of 0 masks everything off
        row = hidden + tl.where(valid, r, 0) * E + e
        leaving = tl.load(row, mask=e < size, other=0.0)
        tl.store(out + tl.where(size > 0, p, 0) * E + e, leaving, mask=e < size)
        if r < stay:
            source = tl.load(order + tl.where(valid, r, 0))
            size = tl.where((source >= stay) & (source < n), size, 0)
            moved = tl.load(hidden + source * E + e, mask=e < size, other=0.0)
            tl.debug_barrier()  # every thread has read what leaves
            tl.store(row, moved, mask=e < size)


def exit_decide(
    score: Tensor,  # [n] fp32
    limit: Tensor,  # [n] fp32
    group: Tensor | None = None,  # [n] int64
) -> tuple[Tensor, Tensor]:  # [n] int64, [1] int64
    """Launches the kernel on the current stream; see `sidestep.kernels.exit_decide`."""
    n = checks_exits.exit_decide(score, limit, group)
    check_device("exit_decide", "score", score, exit_decide_kernel)
    device = score.device
    order = score.new_empty(n, dtype=torch.int64)
    kept = score.new_empty(1, dtype=torch.int64)
    with torch.cuda.device(device) if score.is_cuda else contextlib.nullcontext():
        stays = scratch("exit_decide.stays", device, max(n, 1), torch.int32)
        exit_decide_kernel[(1,)](
            score, limit, group, order, kept, stays, n, ROWS=ROWS, num_warps=NUM_WARPS
        )
    return order, kept


def exit_compact_(
    hidden: Tensor,  # [n, ...] model dtype, written
    out: Tensor,  # [B, ...] model dtype, written
    order: Tensor,  # [n] int64
    kept: Tensor,  # [1] int64
    place: Tensor,  # [n] int64
) -> None:
    """Launches the kernel on the current stream; see `sidestep.kernels.exit_compact_`."""
    n, places = checks_exits.exit_compact_(hidden, out, order, kept, place)
    checks_exits.exit_compact_overlap(hidden, out, order, kept, place)
    check_device("exit_compact_", "hidden", hidden, exit_compact_kernel)
    E = math.prod(hidden.shape[1:])
    if n == 0 or E == 0:
        return
    with torch.cuda.device(hidden.device) if hidden.is_cuda else contextlib.nullcontext():
        exit_compact_kernel[(n * triton.cdiv(E, BLOCK),)](
            hidden, out, order, kept, place, n, places, E, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
