"""How the Triton kernels add up what the blocks of a row have left, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(out, sums, arrivals, row, blocks, size, count: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = the row's sums over its blocks / size, in float64, by the last block to arrive."""
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel", scope="gpu") == blocks - 1:
        WIDTH: tl.constexpr = triton.next_power_of_2(count)
        HEIGHT: tl.constexpr = BLOCK // WIDTH
        k = tl.arange(0, WIDTH)[None, :]
        totals = tl.zeros([HEIGHT, WIDTH], tl.float64)
        for first in range(0, blocks, HEIGHT):
            b = first + tl.arange(0, HEIGHT)[:, None]
            at = sums + (row * blocks + b) * count + k
            # .cg: the other blocks' sums are in L2, never in this multiprocessor's L1.
            some = tl.load(at, (b < blocks) & (k < count), other=0.0, cache_modifier=".cg")
            totals += some.to(tl.float64)
        k = tl.arange(0, WIDTH)
        result = tl.sum(totals, 0) / tl.cast(size, tl.float64)
        tl.store(out + row * count + k, result.to(tl.float32), mask=k < count)
        tl.store(arrivals + row, 0)
