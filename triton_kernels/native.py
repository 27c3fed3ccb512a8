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
        f"solver_step: the native library is not built ({error}); run `pip install -e .`"
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
        _run_cuda(arguments, registers.device)


def _run_cuda(arguments: tuple[object, ...], device: torch.device) -> None:
    if not _native.build_info()["cuda"].startswith("yes"):
        raise BackendUnavailable(
            "solver_step: the native library was built without CUDA kernels "
            f"(cuda: {_native.build_info()['cuda']}); rebuild with SIDESTEP_CUDA=1 or use "
            "SIDESTEP_KERNELS=triton"
        )
    _, _, _, D, *_, rows, _, _ = arguments
    with torch.cuda.device(device):
        nbytes = _native.cuda_solver_step_workspace(rows, D)
        workspace = scratch("solver_step.native", device, nbytes, torch.uint8)
        stream = torch.cuda.current_stream().cuda_stream
        _native.cuda_solver_step(*arguments, workspace.data_ptr(), stream)
