"""The native C++ backend: hands raw addresses to `sidestep._native`, which does not know torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.kernels import checks, checks_exits
from sidestep.kernels.errors import BackendUnavailable
from sidestep.kernels.workspace import scratch

try:
    from sidestep import _native
except ImportError as error:
    raise BackendUnavailable(
        f"sidestep.kernels: the native library is not built ({error}); run `pip install -e .`"
    ) from error

_run = _native.solver_step
_check = checks.solver_step
_DTYPES = checks.MODEL_DTYPES


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
    """One solver step on the CPU or, in a CUDA build, on the current stream of the GPU."""
    slots, R, D, rows, K = _check(
        registers, outputs, weights, noise, table, step, slot, model_input, stats
    )
    arguments = (
        registers.data_ptr(),
        slots,
        R,
        D,
        tuple([output.data_ptr() for output in outputs]),
        _DTYPES[outputs[0].dtype],
        weights.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        table.data_ptr(),
        K,
        step.data_ptr(),
        0 if slot is None else slot.data_ptr(),
        rows,
        0 if model_input is None else model_input.data_ptr(),
        stats.data_ptr(),
    )
    if registers.is_cpu:
        _run(*arguments)
    else:
        _run_cuda("solver_step", arguments, (rows, D), registers.device)


def difference_gram(
    new: Tensor,  # [n, V, D] fp32
    old: Tensor,  # [n, V, D] fp32
) -> Tensor:  # [n, V, V] fp32
    """The inner products of the differences, as `solver_step` runs."""
    n, V, D = checks.difference_gram(new, old)
    gram = new.new_empty((n, V, V))
    arguments = (new.data_ptr(), old.data_ptr(), gram.data_ptr(), n, V, D)
    if new.is_cpu:
        _native.difference_gram(*arguments)
    else:
        _run_cuda("difference_gram", arguments, (n, D, V), new.device)
    return gram


def parareal_correct_(
    boundary: Tensor,  # [n, R, D] fp32, written
    fine: Tensor,  # [n, R, D] fp32
    new: Tensor,  # [n, R+1, D] fp32
    old: Tensor,  # [n, R+1, D] fp32
    coefficients: Tensor,  # [n, R, R+1] fp32
) -> Tensor:  # [n, 2] fp32
    """The correction of parareal, as `solver_step` runs."""
    n, R, D = checks.parareal_correct_(boundary, fine, new, old, coefficients)
    residual = boundary.new_empty((n, 2))
    tensors = (boundary, fine, new, old, coefficients, residual)
    arguments = (*[tensor.data_ptr() for tensor in tensors], n, R, D)
    if boundary.is_cpu:
        _native.parareal_correct(*arguments)
    else:
        _run_cuda("parareal_correct", arguments, (n, D), boundary.device)
    return residual


def exit_score(
    hidden: Tensor,  # [B, N, D] model dtype
    probe: Tensor,  # [k, D] fp32
    bias: Tensor,  # [B, k] fp32
    normalize: bool = True,
    sigmoid: bool = True,
    eps: float = 1e-6,
) -> Tensor:  # [B, k] fp32
    """The exit score, on the CPU."""
    B, N, D, k = checks_exits.exit_score(hidden, probe, bias)
    if not hidden.is_cpu:
        raise BackendUnavailable(
            "exit_score: the native library has no CUDA kernel for it; use SIDESTEP_KERNELS=triton"
        )
    score = bias.new_empty((B, k))
    _native.exit_score(
        *[tensor.data_ptr() for tensor in (hidden, probe, bias, score)],
        B,
        N,
        D,
        hidden.stride(0),
        hidden.stride(1),
        k,
        _DTYPES[hidden.dtype],
        normalize,
        sigmoid,
        eps,
    )
    return score


def exit_decide(
    score: Tensor,  # [n] fp32
    limit: Tensor,  # [n] fp32
    group: Tensor | None = None,  # [n] int64
) -> tuple[Tensor, Tensor]:  # [n] int64, [1] int64
    """Who leaves, as `solver_step` runs."""
    n = checks_exits.exit_decide(score, limit, group)
    order = score.new_empty(n, dtype=torch.int64)
    kept = score.new_empty(1, dtype=torch.int64)
    arguments = (
        score.data_ptr(),
        limit.data_ptr(),
        0 if group is None else group.data_ptr(),
        order.data_ptr(),
        kept.data_ptr(),
        n,
    )
    if score.is_cpu:
        _native.exit_decide(*arguments)
    else:
        _run_cuda("exit_decide", arguments, (n,), score.device)
    return order, kept


def exit_compact_(
    hidden: Tensor,  # [n, ...] model dtype, written
    out: Tensor,  # [B, ...] model dtype, written
    order: Tensor,  # [n] int64
    kept: Tensor,  # [1] int64
    place: Tensor,  # [n] int64
) -> None:
    """Moves the rows, as `solver_step` runs."""
    tensors = (hidden, out, order, kept, place)
    n, places = checks_exits.exit_compact_(*tensors)
    row_bytes = math.prod(hidden.shape[1:]) * hidden.element_size()
    arguments = (*[tensor.data_ptr() for tensor in tensors], n, places, row_bytes)
    if hidden.is_cpu:
        _native.exit_compact(*arguments)
    else:
        _run_cuda("exit_compact", arguments, None, hidden.device)


def _run_cuda(
    operation: str,
    arguments: tuple[object, ...],
    sizes: tuple[int, ...] | None,
    device: torch.device,
) -> None:
    """Calls the operation's GPU launcher; `sizes` is what its workspace depends on, if any."""
    if not _native.build_info()["cuda"].startswith("yes"):
        raise BackendUnavailable(
            f"{operation}: the native library was built without CUDA kernels "
            f"(cuda: {_native.build_info()['cuda']}); rebuild with SIDESTEP_CUDA=1 or use "
            "SIDESTEP_KERNELS=triton"
        )
    with torch.cuda.device(device):
        if sizes is not None:
            nbytes = getattr(_native, f"cuda_{operation}_workspace")(*sizes)
            workspace = scratch(f"{operation}.native", device, nbytes, torch.uint8)
            arguments = (*arguments, workspace.data_ptr())
        stream = torch.cuda.current_stream().cuda_stream
        getattr(_native, f"cuda_{operation}")(*arguments, stream)
