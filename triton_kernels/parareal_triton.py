"""The parareal operators in Triton; `reference` says what they mean.

A program takes one block of one row. The last of a row to arrive adds up the row's sums, in a fixed
order, so the bits of a row depend on nothing but the row.
"""
# Tuples grow in unrolled loops, a type of its own in each turn.
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidestep.kernels import checks
from sidestep.kernels.triton_finish import finish
from sidestep.kernels.triton_launch import check_device, check_version
from sidestep.kernels.workspace import scratch

check_version("parareal_correct_")

BLOCK = 1024
NUM_WARPS = 4  # 8 elements a thread: two 128-bit accesses


@triton.jit
def difference_gram_kernel(
    new,  # [n, V, D] fp32
    old,  # [n, V, D] fp32
    gram,  # [n, V, V] fp32, written
    sums,  # [n, blocks, V, V] fp32, scratch
    arrivals,  # [n] int32, zero between launches
    D,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gram[i, j] = d_i . d_j for one block of one row; grid: n * blocks."""
    blocks = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    d = block * BLOCK + tl.arange(0, BLOCK)
    deltas = ()
    for j in tl.static_range(V):
        deltas += (_difference(new, old, (row * V + j) * D + d, d < D),)
    to = sums + (row * blocks + block) * V * V
    for i in tl.static_range(V):
        for j in tl.static_range(i, V):
            product = tl.sum(deltas[i] * deltas[j], 0)
            tl.store(to + i * V + j, product)
            if i != j:
                tl.store(to + j * V + i, product)
    finish(gram, sums, arrivals, row, blocks, 1, V * V, BLOCK)


@triton.jit
def parareal_correct_kernel(
    boundary,  # [n, R, D] fp32, written
    fine,  # [n, R, D] fp32
    new,  # [n, R+1, D] fp32
    old,  # [n, R+1, D] fp32
    coefficients,  # [n, R, R+1] fp32
    residual,  # [n, 2] fp32, written
    sums,  # [n, blocks, 2] fp32, scratch
    arrivals,  # [n] int32, zero between launches
    D,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """boundary = fine + C . (new - old) for one block of one row; grid: n * blocks."""
    blocks = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    d = block * BLOCK + tl.arange(0, BLOCK)
    C = coefficients + row * R * (R + 1)
    state = row * R * D + d
    before = tl.load(boundary + state, mask=d < D, other=0.0)
    deltas = ()
    for j in tl.static_range(R + 1):
        read = _size_if_used(C + j, D, R)
        deltas += (_difference(new, old, (row * (R + 1) + j) * D + d, d < read),)
    change = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(R):
        at = state + r * tl.cast(D, tl.int64)
        there = tl.load(fine + at, mask=d < D, other=0.0)
        corrected = there + _correction(C + r * (R + 1), deltas, R + 1)
        tl.store(boundary + at, corrected, mask=d < D)
        if r == 0:
            moved = corrected - before
            change = tl.where(d < D, moved * moved, 0.0)
            size = tl.where(d < D, corrected * corrected, 0.0)
    to = sums + (row * blocks + block) * 2
    tl.store(to, tl.sum(change, 0))
    tl.store(to + 1, tl.sum(size, 0))
    finish(residual, sums, arrivals, row, blocks, D, 2, BLOCK)


@triton.jit
def _difference(new, old, at, mask):
    """new - old, and 0 where they are equal (infinities too) or where the mask is off."""
    now = tl.load(new + at, mask=mask, other=0.0)
    before = tl.load(old + at, mask=mask, other=0.0)
    return tl.where(now != before, now - before, 0.0)


@triton.jit
def _size_if_used(coefficients, size, R: tl.constexpr):
    """`size` if any register has a non-zero coefficient in this column, else 0."""
    used = tl.load(coefficients) != 0
    for r in tl.static_range(1, R):
        used = used | (tl.load(coefficients + r * (R + 1)) != 0)
    return tl.where(used, size, 0)


@triton.jit
def _correction(coefficients, deltas, columns: tl.constexpr):
    """sum_j c_j d_j in column order from -0 on: that is what an element without terms adds."""
    # Triton takes the literal -0.0 for 0.
    zero = tl.full(deltas[0].shape, -(2**31), tl.int32).to(tl.float32, bitcast=True)
    total = zero
    for j in tl.static_range(columns):
        c = tl.load(coefficients + j)
        term = tl.where(deltas[j] != 0, c * deltas[j], zero)
        total = tl.where(c != 0, total + term, total)
    return total


def difference_gram(
    new: Tensor,  # [n, V, D] fp32
    old: Tensor,  # [n, V, D] fp32
) -> Tensor:  # [n, V, V] fp32
    """Launches the kernel on the current stream; see `sidestep.kernels.difference_gram`."""
    n, V, D = checks.difference_gram(new, old)
    check_device("difference_gram", "new", new, difference_gram_kernel)
    device, blocks = new.device, triton.cdiv(D, BLOCK)
    if n == 0 or D == 0:
        return new.new_zeros((n, V, V))
    gram = new.new_empty((n, V, V))
    with torch.cuda.device(device) if new.is_cuda else contextlib.nullcontext():
        difference_gram_kernel[(n * blocks,)](
            new,
            old,
            gram,
            scratch("difference_gram.sums", device, n * blocks * V * V, torch.float32),
            scratch("difference_gram.arrivals", device, n, torch.int32),
            D,
            V=V,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return gram


def parareal_correct_(
    boundary: Tensor,  # [n, R, D] fp32, written
    fine: Tensor,  # [n, R, D] fp32
    new: Tensor,  # [n, R+1, D] fp32
    old: Tensor,  # [n, R+1, D] fp32
    coefficients: Tensor,  # [n, R, R+1] fp32
) -> Tensor:  # [n, 2] fp32
    """Launches the kernel on the current stream; see `sidestep.kernels.parareal_correct_`."""
    arguments = (boundary, fine, new, old, coefficients)
    n, R, D = checks.parareal_correct_(*arguments)
    checks.parareal_correct_overlap(*arguments)
    check_device("parareal_correct_", "boundary", boundary, parareal_correct_kernel)
    device, blocks = boundary.device, triton.cdiv(D, BLOCK)
    if n == 0 or D == 0:
        return boundary.new_zeros((n, 2))
    residual = boundary.new_empty((n, 2))
    with torch.cuda.device(device) if boundary.is_cuda else contextlib.nullcontext():
        parareal_correct_kernel[(n * blocks,)](
            *arguments,
            residual,
            scratch("parareal_correct.sums", device, n * blocks * 2, torch.float32),
            scratch("parareal_correct.arrivals", device, n, torch.int32),
            D,
            R=R,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return residual
