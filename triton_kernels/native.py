"""The native C++ backend: hands raw addresses to `sidestep._native`, which does not know torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.kernels import checks
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


def _run_cuda(
    operation: str, arguments: tuple[object, ...], sizes: tuple[int, ...], device: torch.device
) -> None:
    """Calls the operation's GPU launcher; `sizes` is what its workspace depends on."""
    if not _native.build_info()["cuda"].startswith("yes"):
        raise BackendUnavailable(
            f"{operation}: the native library was built without CUDA kernels "
            f"(cuda: {_native.build_info()['cuda']}); rebuild with SIDESTEP_CUDA=1 or use "
            "SIDESTEP_KERNELS=triton"
        )
    with torch.cuda.device(device):
        nbytes = getattr(_native, f"cuda_{operation}_workspace")(*sizes)
        workspace = scratch(f"{operation}.native", device, nbytes, torch.uint8)
        stream = torch.cuda.current_stream().cuda_stream
        getattr(_native, f"cuda_{operation}")(*arguments, workspace.data_ptr(), stream)
