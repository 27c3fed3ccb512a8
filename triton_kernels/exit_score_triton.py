"""The exit score in Triton; `reference.exit_score` says what it means.

A program takes some tokens of one row, and holds them in registers from their one read on. The
last of a row to arrive adds up the row's sums, in a fixed order, so the bits of a row depend on
nothing but the row.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidestep.kernels import checks_exits
from sidestep.kernels.triton_finish import finish
from sidestep.kernels.triton_launch import check_device, check_version
from sidestep.kernels.workspace import scratch

check_version("exit_score")

ELEMENTS = 4096  # of a program at least; a thread holds 32 of them
NUM_WARPS = 4
FINISH = 1024


@triton.jit
def exit_score_kernel(
    hidden,  # [B, N, D] model dtype, the last stride 1
    probe,  # [k, D] fp32
    bias,  # [B, k] fp32
    score,  # [B, k] fp32, written
    sums,  # [B, blocks, k] fp32, scratch
    arrivals,  # [B] int32, zero between launches
    row_stride,
    token_stride,
    N,
    D,
    eps,
    k: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    FINISH: tl.constexpr,
):
    """sum_n f(rstd_n (w_j . (h_n - mu_n)) + bias_j) over a block of tokens; grid: B * blocks."""
    blocks = tl.cdiv(N, TOKENS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    n = block * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, WIDTH)
    inside = (n[:, None] < N) & (d[None, :] < D)
    at = hidden + row * row_stride + n[:, None] * token_stride + d[None, :]
    h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.full([TOKENS], 1.0, tl.float32)
    if NORMALIZE:
        size = tl.cast(D, tl.float32)
        mean = tl.div_rn(tl.sum(h, 1), size)
        h = tl.where(inside, h - mean[:, None], 0.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(h * h, 1), size) + eps))
    to = sums + (row * blocks + block) * k
    for j in tl.static_range(k):
        w = tl.load(probe + j * tl.cast(D, tl.int64) + d, mask=d < D, other=0.0)
        value = rstd * tl.sum(w[None, :] * h, 1) + tl.load(bias + row * k + j)
        if SIGMOID:
            value = tl.div_rn(1.0, 1.0 + tl.exp(-value))
        tl.store(to + j, tl.sum(tl.where(n < N, value, 0.0), 0))
    finish(score, sums, arrivals, row, blocks, N, k, FINISH)


def exit_score(
    hidden: Tensor,  # [B, N, D] model dtype
    probe: Tensor,  # [k, D] fp32
    bias: Tensor,  # [B, k] fp32
    normalize: bool = True,
    sigmoid: bool = True,
    eps: float = 1e-6,
) -> Tensor:  # [B, k] fp32
    """Launches the kernel on the current stream; see `sidestep.kernels.exit_score`."""
    B, N, D, k = checks_exits.exit_score(hidden, probe, bias)
    check_device("exit_score", "hidden", hidden, exit_score_kernel)
    if B == 0 or N == 0:
        return bias.new_zeros((B, k))
    device, width = hidden.device, triton.next_power_of_2(D)
    tokens = max(1, ELEMENTS // width)
    blocks = triton.cdiv(N, tokens)
    score = bias.new_empty((B, k))
    with torch.cuda.device(device) if hidden.is_cuda else contextlib.nullcontext():
        exit_score_kernel[(B * blocks,)](
            hidden,
            probe,
            bias,
            score,
            scratch("exit_score.sums", device, B * blocks * k, torch.float32),
            scratch("exit_score.arrivals", device, B, torch.int32),
            hidden.stride(0),
            hidden.stride(1),
            N,
            D,
            eps,
            k=k,
            NORMALIZE=normalize,
            SIGMOID=sigmoid,
            TOKENS=tokens,
            WIDTH=width,
            FINISH=max(FINISH, triton.next_power_of_2(k)),
            num_warps=max(NUM_WARPS, width // 1024),
            enable_fp_fusion=False,
        )
    return score
