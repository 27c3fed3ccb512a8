"""Every operator of `sidestep`: its schema, its fake, and which backend runs it.

Each operator is `torch.ops.sidestep.<name>` (so it can be traced, compiled and profiled) and a
plain function of this module. The plain function calls the backend itself when nothing is
watching, which saves the dispatcher's four microseconds on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sidestep.kernels import checks, config
from sidestep.kernels.errors import BackendUnavailable

SCHEMAS = {
    "solver_step": (
        "(Tensor(a!) registers, Tensor[] outputs, Tensor weights, Tensor? noise, Tensor table, "
        "Tensor step, Tensor? slot, Tensor(b!)? model_input, Tensor(c!) stats) -> ()"
    ),
    "difference_gram": "(Tensor new, Tensor old) -> Tensor",
    "parareal_correct_": (
        "(Tensor(a!) boundary, Tensor fine, Tensor new, Tensor old, Tensor coefficients) -> Tensor"
    ),
}

_AUTO = {"cpu": "native", "cuda": "triton"}
_TRITON = {  # the module of each operator's Triton kernel
    "solver_step": "solver_step_triton",
    "difference_gram": "parareal_triton",
    "parareal_correct_": "parareal_triton",
}
_library = torch.library.Library("sidestep", "DEF")
_loaded: dict[tuple[str, str, str], Callable[..., Any]] = {}


def solver_step(
    registers: Tensor,  # [slots, R, D] fp32, written
    outputs: Sequence[Tensor],  # G of [rows, D] fp32 | fp16 | bf16
    weights: Tensor,  # [rows, G] fp32
    noise: Tensor | None,  # [rows, D] fp32
    table: Tensor,  # [K, (R+1)*(R+2)+1] fp32
    step: Tensor,  # [rows] int64
    slot: Tensor | None,  # [rows] int64
    model_input: Tensor | None,  # [G, rows, D] the dtype of outputs, written
    stats: Tensor,  # [rows, 2] fp32, written
) -> None:
    """Advances every row by one solver step, in place, in one pass over memory.

    With M and E the matrix and the error functional of the row's own step k = step[row], and
    x the row's registers[0] (DESIGN section 1):

        u          = sum_g weights[row, g] * outputs[g][row]
        registers' = M . [registers; u; noise]
        stats      = mean |x' - x|,  mean |E . [registers; u; noise]|
        model_input[g] = cast(next_scale * x')      for every branch g

    All arithmetic is fp32, without fma, in column order; a sum starts at its first term with a
    non-zero coefficient. What has a zero coefficient is not read (a NaN there does not spread),
    and a register whose row of M is the identity is not written. Registers and model_input are
    the same bits on every backend and for every batch size. There is no backward.

    Args:
        registers: State of every slot; R in 1..6. Only slots owned by a row are written.
        outputs: Raw model output of each guidance branch; 1 to 3 of them, of one dtype.
        weights: Weight of each branch in u.
        noise: Unit noise, or None: its coefficients then count as zero.
        table: A row per step: (R+1) x (R+2) coefficients, row-major, then next_scale. Columns are
            the R registers, u, noise; rows are the R new registers, then E.
        step: The step k of each row, 0 <= k < K.
        slot: The slot each row owns, all different; None means that row i owns slot i.
        model_input: Receives the input of the next model call, or None. Rounds to nearest even.
        stats: Receives the mean step size and the mean error estimate of each row; 0 if D is 0.

    Raises:
        ValueError: A shape, device or layout is wrong, or a written tensor overlaps another; on the
            CPU also a step or slot out of range and a slot given twice. On CUDA nothing can be
            checked without a sync: a row out of range is left untouched and its stats are NaN.
        TypeError: A dtype is wrong.
        BackendUnavailable: The backend chosen by `SIDESTEP_KERNELS` cannot run here.
    """
    if is_watched(registers):
        torch.ops.sidestep.solver_step.default(
            registers, outputs, weights, noise, table, step, slot, model_input, stats
        )
    else:
        run = _backend("solver_step", registers)
        run(registers, outputs, weights, noise, table, step, slot, model_input, stats)


def difference_gram(
    new: Tensor,  # [n, V, D] fp32
    old: Tensor,  # [n, V, D] fp32
) -> Tensor:  # [n, V, V] fp32
    """The inner products of each row's differences, in one pass over memory.

        d_j            = new_j - old_j, exactly 0 where both are equal
        result[i, j]   = d_i . d_j          symmetric, the full matrix

    Differences, products and the sums of up to 2048 elements are fp32, the sum of those float64
    (in the reference all but the differences). A row's result does not depend, to the last bit, on
    the other rows or on how many there are; backends differ by the order of their sums. Reads 8 V
    bytes per element of D. There is no backward.

    Args:
        new: V vectors a row, in one iterate of parareal; V in 1..7.
        old: The same in another. It may be the tensor `new`.

    Returns:
        The matrices; zeros if D is 0.

    Raises:
        ValueError: A shape, device or layout is wrong.
        TypeError: A dtype is wrong.
        BackendUnavailable: The backend chosen by `SIDESTEP_KERNELS` cannot run here.
    """
    if is_watched(new):
        return torch.ops.sidestep.difference_gram.default(new, old)
    return _backend("difference_gram", new)(new, old)


def parareal_correct_(
    boundary: Tensor,  # [n, R, D] fp32, written
    fine: Tensor,  # [n, R, D] fp32
    new: Tensor,  # [n, R+1, D] fp32
    old: Tensor,  # [n, R+1, D] fp32
    coefficients: Tensor,  # [n, R, R+1] fp32
) -> Tensor:  # [n, 2] fp32
    """Corrects the boundary of each row's block, in place, in one pass over memory.

    SRDS, Alg. 1, for a coarse solver that is linear in the registers and the model output:

        x_i^p[r] = fine[r] + (sum_j coefficients[r, j] * (new_j - old_j))
        result   = mean (x_i^p[0] - x_i^{p-1}[0])^2,  mean (x_i^p[0])^2

    All arithmetic is fp32, without fma; the sum runs over its columns in order and is added to
    `fine` last. Where new_j and old_j are equal (infinities too) the term is left out, and where
    all are, boundary is `fine` bit for bit, -0 included, whatever the coefficients. A column whose
    coefficients are all 0 is not read (a NaN there does not spread). Boundary is the same bits on
    every backend and for every n; the means' sums differ between backends in their order, and not
    with n. Reads and writes 4 (4 R + 3) bytes per element of D. There is no backward.

    Args:
        boundary: x_i^{p-1}, becomes x_i^p; R in 1..6. Of the old values register 0 alone is read.
        fine: F_i^p, what the fine solver made of the block from x_{i-1}^{p-1}.
        new: Registers and model output at the block's start in iterate p: [x_{i-1}^p; u^p].
        old: The same in iterate p - 1.
        coefficients: C_i, the coarse solver.

    Returns:
        The residuals; zeros if D is 0.

    Raises:
        ValueError: A shape, device or layout is wrong, or boundary overlaps another argument.
        TypeError: A dtype is wrong.
        BackendUnavailable: The backend chosen by `SIDESTEP_KERNELS` cannot run here.
    """
    arguments = (boundary, fine, new, old, coefficients)
    if is_watched(boundary):
        return torch.ops.sidestep.parareal_correct_.default(*arguments)
    return _backend("parareal_correct_", boundary)(*arguments)


def is_watched(tensor: Tensor) -> bool:
    """Whether a compiler, tracer, profiler or tensor subclass must see this call."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.profiler._is_profiler_enabled
    )


def _backend(operator: str, tensor: Tensor) -> Callable[..., Any]:
    """Returns the function that runs `operator` on the tensor's device, loaded on first use."""
    key = (operator, config.backend(), "cpu" if tensor.is_cpu else tensor.device.type)
    found = _loaded.get(key)
    if found is None:
        found = _loaded[key] = _load(*key)
    return found


def _load(operator: str, backend: str, device: str) -> Callable[..., Any]:
    if device == "meta":
        return _FAKES[operator]
    if backend == "auto":
        if device not in _AUTO:
            raise BackendUnavailable(
                f"{operator}: no kernel for device {device}, expected cpu or cuda; "
                "SIDESTEP_KERNELS=reference runs on any device"
            )
        backend = _AUTO[device]
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise BackendUnavailable(
            f"{operator}: the Triton backend needs `pip install triton`, which is not installed; "
            "SIDESTEP_KERNELS=reference runs without it"
        )
    name = _TRITON[operator] if backend == "triton" else backend
    return getattr(importlib.import_module(f"sidestep.kernels.{name}"), operator)


def _kernel(operator: str) -> Callable[..., Any]:
    """Returns what the dispatcher calls for real tensors."""

    def run(first: Tensor, *rest: object) -> Any:
        return _backend(operator, first)(first, *rest)

    return run


def _solver_step_fake(*arguments: Any) -> None:
    checks.solver_step(*arguments)


def _difference_gram_fake(new: Tensor, old: Tensor) -> Tensor:
    n, V, _ = checks.difference_gram(new, old)
    return new.new_empty((n, V, V))


def _parareal_correct_fake(boundary: Tensor, *read: Tensor) -> Tensor:
    n, _, _ = checks.parareal_correct_(boundary, *read)
    return boundary.new_empty((n, 2))


_FAKES: dict[str, Callable[..., Any]] = {
    "solver_step": _solver_step_fake,
    "difference_gram": _difference_gram_fake,
    "parareal_correct_": _parareal_correct_fake,
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _kernel(_name), "CPU")
    _library.impl(_name, _kernel(_name), "CUDA")
    torch.library.register_fake(f"sidestep::{_name}", _FAKES[_name], lib=_library)
