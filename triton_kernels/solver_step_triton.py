"""The fused solver step in Triton and its launcher; `reference.solver_step` says what it means."""
# Tuples grow in unrolled loops, a type of its own in each turn.
# mypy: disable-error-code="assignment,misc"

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidestep.kernels import checks
from sidestep.kernels.triton_launch import check_device, check_version
from sidestep.kernels.workspace import scratch

check_version("solver_step")

BLOCK = 1024
NUM_WARPS = 4  # 8 elements a thread: one 128-bit access in half precision, two in fp32


@triton.jit(do_not_specialize=["slots", "rows", "K"])
def solver_step_kernel(
    registers,  # [slots, R, D] fp32, written
    output0,  # [rows, D] model dtype
    output1,  # [rows, D] or None
    output2,  # [rows, D] or None
    weights,  # [rows, G] fp32
    noise,  # [rows, D] fp32 or None
    table,  # [K, (R+1)*(R+2)+1] fp32
    step,  # [rows] int64
    slot,  # [rows] int64 or None
    model_input,  # [G, rows, D] model dtype or None, written
    stats,  # [rows, 2] fp32, written
    sums,  # [rows, blocks, 2] fp32, scratch
    arrivals,  # [rows] int32, zero between launches
    slots,
    rows,
    K,
    D,
    R: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """registers' = M . [registers; u; noise] for one block of one row; grid: rows * blocks."""
    blocks = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    k = tl.load(step + row)
    owned = row
    if slot is not None:
        owned = tl.load(slot + row)
    valid = (k >= 0) & (k < K) & (owned >= 0) & (owned < slots)
    coefficients = table + tl.where(valid, k, 0) * ((R + 1) * (R + 2) + 1)
    d = block * BLOCK + tl.arange(0, BLOCK)
    size = tl.where(valid, D, 0)  # a size of 0 masks everything off
    x = registers + tl.where(valid, owned, 0) * R * D + d

    # Everything is read before anything is written.
    outputs = (output0, output1, output2)
    values = _read(x, outputs, weights, noise, coefficients, row, d, size, D, R, G)
    columns: tl.constexpr = R + 1 if noise is None else R + 2
    new = _multiply(coefficients, values, R, columns)

    for i in tl.static_range(R):
        moving = _size_if_moving(coefficients + i * (R + 2), i, size, columns)
        tl.store(x + i * tl.cast(D, tl.int64), new[i], mask=d < moving)
    if model_input is not None:
        scaled = new[0] * tl.load(coefficients + (R + 1) * (R + 2))
        for g in tl.static_range(G):
            there = model_input + (g * tl.cast(rows, tl.int64) + row) * D + d
            tl.store(there, scaled.to(model_input.dtype.element_ty), mask=d < size)

    step_size = tl.sum(tl.where(d < size, tl.abs(new[0] - values[0]), 0.0), 0)
    error = tl.sum(tl.where(d < size, tl.abs(new[R]), 0.0), 0)
    _finish_stats(stats, sums, arrivals, step_size, error, row, block, blocks, valid, D, BLOCK)


@triton.jit
def _read(
    x,  # one row's registers[0], at d
    outputs,  # 3 of [rows, D] or None
    weights,  # [rows, G]
    noise,  # [rows, D] or None
    coefficients,  # [W]
    row,
    d,  # [BLOCK]
    size,
    D,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """The columns of M: registers, u and, if there is any, noise; unused ones are not read."""
    values = (tl.load(x, mask=d < size, other=0.0),)
    for i in tl.static_range(1, R):
        used = _size_if_used(coefficients, i, size, R)
        values += (tl.load(x + i * tl.cast(D, tl.int64), mask=d < used, other=0.0),)
    used = _size_if_used(coefficients, R, size, R)
    branches = ()
    for g in tl.static_range(G):
        read = tl.where(tl.load(weights + row * G + g) != 0, used, 0)
        output = tl.load(outputs[g] + row * D + d, mask=d < read, other=0.0)
        branches += (output.to(tl.float32),)
    values += (_combine(weights + row * G, branches, G),)
    if noise is not None:
        used = _size_if_used(coefficients, R + 1, size, R)
        values += (tl.load(noise + row * D + d, mask=d < used, other=0.0),)
    return values


@triton.jit
def _multiply(coefficients, values, R: tl.constexpr, columns: tl.constexpr):
    """The new registers, M . values, and last the error estimate, E . values."""
    new = ()
    for i in tl.static_range(R + 1):
        new += (_combine(coefficients + i * (R + 2), values, columns),)
    return new


@triton.jit
def _size_if_used(coefficients, column, size, R: tl.constexpr):
    """`size` if any row of M or E has a non-zero coefficient in `column`, else 0."""
    used = tl.load(coefficients + column) != 0
    for i in tl.static_range(1, R + 1):
        used = used | (tl.load(coefficients + i * (R + 2) + column) != 0)
    return tl.where(used, size, 0)


@triton.jit
def _size_if_moving(coefficients, i: tl.constexpr, size, columns: tl.constexpr):
    """0 if row i of M is the unit vector e_i (the register stays as it is), else `size`."""
    moving = tl.load(coefficients + i) != 1
    for j in tl.static_range(columns):
        if j != i:
            moving = moving | (tl.load(coefficients + j) != 0)
    return tl.where(moving, size, 0)


@triton.jit
def _combine(coefficients, values, columns: tl.constexpr):
    """sum_j c_j v_j in column order, from the first non-zero c_j on, skipping every zero c_j."""
    total = tl.zeros_like(values[0])
    started = False
    for j in tl.static_range(columns):
        c = tl.load(coefficients + j)
        term = c * values[j]
        total = tl.where(c != 0, tl.where(started, total + term, term), total)
        started = started | (c != 0)
    return total


@triton.jit
def _finish_stats(
    stats, sums, arrivals, step_size, error, row, block, blocks, valid, D, BLOCK: tl.constexpr
):
    """Means in a fixed order: every block leaves its sums, the last to arrive adds them all up."""
    sums = sums + row * blocks * 2
    tl.store(sums + block * 2, step_size)
    tl.store(sums + block * 2 + 1, error)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel", scope="gpu") == blocks - 1:
        step_sizes = tl.zeros([BLOCK], tl.float32)
        errors = tl.zeros([BLOCK], tl.float32)
        for first in range(0, blocks, BLOCK):
            b = first + tl.arange(0, BLOCK)
            # .cg: the other blocks' sums are in L2, never in this multiprocessor's L1.
            step_sizes += tl.load(sums + b * 2, b < blocks, other=0.0, cache_modifier=".cg")
            errors += tl.load(sums + b * 2 + 1, b < blocks, other=0.0, cache_modifier=".cg")
        size = tl.cast(D, tl.float32)
        nan = float("nan")
        tl.store(stats + row * 2, tl.where(valid, tl.sum(step_sizes, 0) / size, nan))
        tl.store(stats + row * 2 + 1, tl.where(valid, tl.sum(errors, 0) / size, nan))
        tl.store(arrivals + row, 0)


def solver_step(
    registers: Tensor,  # [slots, R, D] fp32, written
    outputs: Sequence[Tensor],  # G of [rows, D] model dtype
    weights: Tensor,  # [rows, G] fp32
    noise: Tensor | None,  # [rows, D] fp32
    table: Tensor,  # [K, (R+1)*(R+2)+1] fp32
    step: Tensor,  # [rows] int64
    slot: Tensor | None,  # [rows] int64
    model_input: Tensor | None,  # [G, rows, D] model dtype, written
    stats: Tensor,  # [rows, 2] fp32, written
) -> None:
    """Launches the kernel on the current stream; see `sidestep.kernels.solver_step`."""
    arguments = (registers, outputs, weights, noise, table, step, slot, model_input, stats)
    slots, R, D, rows, K = checks.solver_step(*arguments)
    checks.solver_step_overlap(*arguments)
    check_device("solver_step", "registers", registers, solver_step_kernel)
    device, blocks = registers.device, triton.cdiv(D, BLOCK)
    if rows == 0 or D == 0:
        stats.zero_()
        return
    with torch.cuda.device(device) if registers.is_cuda else contextlib.nullcontext():
        solver_step_kernel[(rows * blocks,)](
            registers,
            *(*outputs, None, None)[:3],
            weights,
            noise,
            table,
            step,
            slot,
            model_input,
            stats,
            scratch("solver_step.sums", device, rows * blocks * 2, torch.float32),
            scratch("solver_step.arrivals", device, rows, torch.int32),
            slots,
            rows,
            K,
            D,
            R=R,
            G=len(outputs),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
