"""Validation, written once for every backend: everything is checked before anything is touched.

What bears an operator's name reads no addresses, so it also runs on the fake tensors of
`torch.compile`. A good call passes through it in a few microseconds: each property of a tensor is
read once, and what is wrong is only found out, by `refuse`, when something is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.kernels.refusals import check, refuse, refuse_overlap, refuse_shape

MAX_REGISTERS = 6
MAX_BRANCHES = 3
MODEL_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MODEL_DTYPE_NAMES = "float32, float16 or bfloat16"

_OUTPUT_NAMES = ("outputs[0]", "outputs[1]", "outputs[2]")
_FP32, _INT64 = torch.float32, torch.int64


def table_width(registers: int) -> int:
    """Returns the width of one row of a coefficient table, (R+1) * (R+2) + 1.

    Args:
        registers: R, the number of registers of the plan.
    """
    return (registers + 1) * (registers + 2) + 1


def solver_step(
    registers: Tensor,  # [slots, R, D] fp32
    outputs: Sequence[Tensor],  # G of [rows, D] model dtype
    weights: Tensor,  # [rows, G] fp32
    noise: Tensor | None,  # [rows, D] fp32
    table: Tensor,  # [K, (R+1)*(R+2)+1] fp32
    step: Tensor,  # [rows] int64
    slot: Tensor | None,  # [rows] int64
    model_input: Tensor | None,  # [G, rows, D] model dtype
    stats: Tensor,  # [rows, 2] fp32
) -> tuple[int, int, int, int, int]:
    """Checks shapes, dtypes, devices and contiguity.

    Returns:
        The sizes (slots, R, D, rows, K).

    Raises:
        ValueError: a shape, device or layout is wrong.
        TypeError: a dtype is wrong.
    """
    of_registers, of_step, of_table = registers.shape, step.shape, table.shape
    if len(of_registers) != 3 or not 1 <= of_registers[1] <= MAX_REGISTERS:
        refuse_shape(
            "solver_step", "registers", registers, f"[slots, R, D] with R in 1..{MAX_REGISTERS}"
        )
    if len(of_step) != 1:
        refuse_shape("solver_step", "step", step, "[rows]")
    slots, R, D = of_registers
    rows, K, G = of_step[0], of_table[0] if of_table else 0, len(outputs)
    if not 1 <= G <= MAX_BRANCHES:
        raise ValueError(f"solver_step: outputs has {G} branches, expected 1 to {MAX_BRANCHES}")
    if rows > slots:
        raise ValueError(
            f"solver_step: registers has {slots} slots, expected at least the {rows} rows"
        )
    width = (R + 1) * (R + 2) + 1
    if K < 1:
        refuse_shape("solver_step", "table", table, f"[K, {width}] with K at least 1")
    dtype, on_cpu = outputs[0].dtype, registers.is_cpu
    if dtype not in MODEL_DTYPES:
        raise TypeError(f"solver_step: outputs[0] has dtype {dtype}, expected {MODEL_DTYPE_NAMES}")
    for name, tensor, shape, wanted in (
        ("registers", registers, of_registers, _FP32),
        ("weights", weights, (rows, G), _FP32),
        ("noise", noise, (rows, D), _FP32),
        ("table", table, (K, width), _FP32),
        ("step", step, of_step, _INT64),
        ("slot", slot, (rows,), _INT64),
        ("model_input", model_input, (G, rows, D), dtype),
        ("stats", stats, (rows, 2), _FP32),
        *[(name, o, (rows, D), dtype) for name, o in zip(_OUTPUT_NAMES, outputs, strict=False)],
    ):
        if tensor is not None and (
            tensor.shape != shape
            or tensor.dtype is not wanted
            or tensor.is_cpu is not on_cpu
            or not (on_cpu or tensor.device == registers.device)
            or not tensor.is_contiguous()
        ):
            refuse("solver_step", name, tensor, shape, wanted, "registers", registers.device)
    return slots, R, D, rows, K


def solver_step_overlap(
    registers: Tensor,  # [slots, R, D] fp32
    outputs: Sequence[Tensor],  # G of [rows, D] model dtype
    weights: Tensor,  # [rows, G] fp32
    noise: Tensor | None,  # [rows, D] fp32
    table: Tensor,  # [K, W] fp32
    step: Tensor,  # [rows] int64
    slot: Tensor | None,  # [rows] int64
    model_input: Tensor | None,  # [G, rows, D] model dtype
    stats: Tensor,  # [rows, 2] fp32
) -> None:
    """Checks that what is written overlaps nothing else (the native library does so by itself).

    Raises:
        ValueError: registers, model_input or stats overlaps another argument.
    """
    written = {"registers": registers, "model_input": model_input, "stats": stats}
    read = {"weights": weights, "noise": noise, "table": table, "step": step, "slot": slot}
    read |= dict(zip(_OUTPUT_NAMES, outputs, strict=False))
    refuse_overlap("solver_step", written, read)


def solver_step_rows(
    step: Tensor,  # [rows] int64
    slot: Tensor | None,  # [rows] int64
    steps: int,
    slots: int,
) -> None:
    """Checks the values of step and slot (the native library does so by itself).

    Args:
        step: The step of each row.
        slot: The slot of each row, or None.
        steps: K, the number of steps in the table.
        slots: The number of slots.

    Raises:
        ValueError: a step or slot is out of range, or a slot is given twice.
    """
    for row, k in enumerate(step.tolist()):
        if not 0 <= k < steps:
            raise ValueError(f"solver_step: step[{row}] is {k}, expected 0 <= step < {steps}")
    owned = [] if slot is None else slot.tolist()
    for row, s in enumerate(owned):
        if not 0 <= s < slots:
            raise ValueError(f"solver_step: slot[{row}] is {s}, expected 0 <= slot < {slots}")
    for s in owned:
        if owned.count(s) > 1:
            raise ValueError(f"solver_step: slot holds {s} twice, expected one row per slot")


def difference_gram(
    new: Tensor,  # [n, V, D] fp32
    old: Tensor,  # [n, V, D] fp32
) -> tuple[int, int, int]:
    """Checks shapes, dtypes, devices and contiguity; returns the sizes (n, V, D).

    Raises:
        ValueError: a shape, device or layout is wrong.
        TypeError: a dtype is wrong.
    """
    shape, most = new.shape, MAX_REGISTERS + 1
    if len(shape) != 3 or not 1 <= shape[1] <= most:
        refuse_shape("difference_gram", "new", new, f"[n, V, D] with V in 1..{most}")
    check("difference_gram", {"new": (new, shape), "old": (old, shape)})
    return shape[0], shape[1], shape[2]


def parareal_correct_(
    boundary: Tensor,  # [n, R, D] fp32
    fine: Tensor,  # [n, R, D] fp32
    new: Tensor,  # [n, R+1, D] fp32
    old: Tensor,  # [n, R+1, D] fp32
    coefficients: Tensor,  # [n, R, R+1] fp32
) -> tuple[int, int, int]:
    """Checks shapes, dtypes, devices and contiguity; returns the sizes (n, R, D).

    Raises:
        ValueError: a shape, device or layout is wrong.
        TypeError: a dtype is wrong.
    """
    shape = boundary.shape
    if len(shape) != 3 or not 1 <= shape[1] <= MAX_REGISTERS:
        expected = f"[n, R, D] with R in 1..{MAX_REGISTERS}"
        refuse_shape("parareal_correct_", "boundary", boundary, expected)
    n, R, D = shape
    check(
        "parareal_correct_",
        {
            "boundary": (boundary, shape),
            "fine": (fine, shape),
            "new": (new, (n, R + 1, D)),
            "old": (old, (n, R + 1, D)),
            "coefficients": (coefficients, (n, R, R + 1)),
        },
    )
    return n, R, D


def parareal_correct_overlap(
    boundary: Tensor,  # [n, R, D] fp32
    fine: Tensor,  # [n, R, D] fp32
    new: Tensor,  # [n, R+1, D] fp32
    old: Tensor,  # [n, R+1, D] fp32
    coefficients: Tensor,  # [n, R, R+1] fp32
) -> None:
    """Checks that boundary overlaps nothing else (the native library does so by itself).

    Raises:
        ValueError: boundary overlaps another argument.
    """
    read = {"fine": fine, "new": new, "old": old, "coefficients": coefficients}
    refuse_overlap("parareal_correct_", {"boundary": boundary}, read)
