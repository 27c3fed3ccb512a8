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

from sidestep.kernels import checks, checks_exits, config
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
    "exit_score": (
        "(Tensor hidden, Tensor probe, Tensor bias, bool normalize=True, bool sigmoid=True, "
        "float eps=1e-6) -> Tensor"
    ),
    "exit_decide": "(Tensor score, Tensor limit, Tensor? group=None) -> (Tensor, Tensor)",
    "exit_compact_": (
        "(Tensor(a!) hidden, Tensor(b!) out, Tensor order, Tensor kept, Tensor place) -> ()"
    ),
}

_AUTO = {"cpu": "native", "cuda": "triton"}
_TRITON = {  # the module of each operator's Triton kernel
    "solver_step": "solver_step_triton",
    "difference_gram": "parareal_triton",
    "parareal_correct_": "parareal_triton",
    "exit_score": "exit_score_triton",
    "exit_decide": "exit_compact_triton",
    "exit_compact_": "exit_compact_triton",
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
    x the row's registers[0] (docs/plans.md):

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


def exit_score(
    hidden: Tensor,  # [B, N, D] fp32 | fp16 | bf16
    probe: Tensor,  # [k, D] fp32
    bias: Tensor,  # [B, k] fp32
    normalize: bool = True,
    sigmoid: bool = True,
    eps: float = 1e-6,
) -> Tensor:  # [B, k] fp32
    """How certain each row's hidden state is, by k linear probes, in one pass over memory.

    AdaDiff's uncertainty estimation module; time enters through the bias of each row:

        z[b, n, j]   = probe_j . LN(h[b, n]) + bias[b, j]
                     = rstd_bn (probe_j . (h[b, n] - mu_bn)) + bias[b, j]
        result[b, j] = mean_n sigmoid(z[b, n, j])

    LN is without affine. It is never formed: its scale is taken out of the inner product, its mean
    is taken off before, so a large mean costs no digits. Products and the sums of up to 1024
    elements are fp32 (in the reference float64). A row's result does not depend, to the last bit,
    on the other rows or on how many there are; backends differ by the order of their sums. There
    is no backward.

    Args:
        hidden: Tokens of every row, D in 1..16384. Rows and tokens may lie at any stride (image
            tokens are a slice of all tokens); the elements of a token are adjacent.
        probe: The probes.
        bias: What is added for each row and probe: for AdaDiff v_j . temb + b_j.
        normalize: LN; without it mu is 0 and rstd 1, as in AdaDiff's released code.
        sigmoid: Without it the mean of z itself.
        eps: Of LN, in 1 / sqrt(var + eps).

    Returns:
        The scores; zeros if N is 0.

    Raises:
        ValueError: A shape, device or layout is wrong.
        TypeError: A dtype is wrong.
        BackendUnavailable: The backend chosen by `SIDESTEP_KERNELS` cannot run here.
    """
    if is_watched(hidden):
        run = torch.ops.sidestep.exit_score.default
        return run(hidden, probe, bias, normalize, sigmoid, eps)
    return _backend("exit_score", hidden)(hidden, probe, bias, normalize, sigmoid, eps)


def exit_decide(
    score: Tensor,  # [n] fp32
    limit: Tensor,  # [n] fp32
    group: Tensor | None = None,  # [n] int64
) -> tuple[Tensor, Tensor]:  # [n] int64, [1] int64
    """Which rows leave the network here, and how those that stay close up.

    A row leaves if score <= limit holds for it and for every row of its group. NaN stays. (Rows
    that share one damage, as guidance branches do, are given the same score.)

    Args:
        score: Uncertainty or predicted damage of each row; smaller is better.
        limit: What each row may have.
        group: Rows with the same number, in 0..n-1, decide jointly: guidance pairs. None: every
            row for itself.

    Returns:
        order and kept, a single number. order[kept:] are the rows that leave, ascending.
        order[p], for p < kept, is the row that moves to position p: p itself if it stays; the
        holes, ascending, take the rows from position kept on that stay, ascending. `tensor[order]`
        so reorders whatever else has a row for each row; kept is the one value a host has to read.

    Raises:
        ValueError: A shape, device or layout is wrong; on the CPU also a group out of range. (On
            CUDA, where nothing can be checked without a sync, such a row stays.)
        TypeError: A dtype is wrong.
        BackendUnavailable: The backend chosen by `SIDESTEP_KERNELS` cannot run here.
    """
    if is_watched(score):
        return torch.ops.sidestep.exit_decide.default(score, limit, group)
    return _backend("exit_decide", score)(score, limit, group)


def exit_compact_(
    hidden: Tensor,  # [n, ...] fp32 | fp16 | bf16, written
    out: Tensor,  # [B, ...] the dtype of hidden, written
    order: Tensor,  # [n] int64
    kept: Tensor,  # [1] int64
    place: Tensor,  # [n] int64
) -> None:
    """Moves the rows that leave to their place, and closes up those that stay, in place.

        out[place[r]] = hidden[r]            for every r in order[kept:]
        hidden[:kept] = hidden[order[:kept]]

    Only rows that leave and rows that fill their holes are read or written: min(kept, n - kept)
    copies beside the n - kept to `out`, where a gather makes `kept` and a new tensor. What lies in
    hidden[kept:] afterwards is undefined. The caller must own `hidden`: a tensor that others still
    read, like a long skip connection's, is gathered instead, by `tensor[order[:kept]]`. There is no
    backward.

    Args:
        hidden: The rows.
        out: Where those that leave go.
        order: From `exit_decide`.
        kept: From `exit_decide`.
        place: The row of `out` that belongs to each row of `hidden`, all different.

    Raises:
        ValueError: A shape, device or layout is wrong, or a written tensor overlaps another; on the
            CPU also order and kept that `exit_decide` does not return, and a place out of range or
            given twice. (On CUDA nothing can be checked without a sync: a row out of range is not
            moved.)
        TypeError: A dtype is wrong.
        BackendUnavailable: The backend chosen by `SIDESTEP_KERNELS` cannot run here.
    """
    if is_watched(hidden):
        torch.ops.sidestep.exit_compact_.default(hidden, out, order, kept, place)
    else:
        _backend("exit_compact_", hidden)(hidden, out, order, kept, place)


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


def _exit_score_fake(hidden: Tensor, probe: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    B, _, _, k = checks_exits.exit_score(hidden, probe, bias)
    return bias.new_empty((B, k))


def _exit_decide_fake(
    score: Tensor, limit: Tensor, group: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    n = checks_exits.exit_decide(score, limit, group)
    return score.new_empty(n, dtype=torch.int64), score.new_empty(1, dtype=torch.int64)


def _exit_compact_fake(*arguments: Tensor) -> None:
    checks_exits.exit_compact_(*arguments)


_FAKES: dict[str, Callable[..., Any]] = {
    "solver_step": _solver_step_fake,
    "difference_gram": _difference_gram_fake,
    "parareal_correct_": _parareal_correct_fake,
    "exit_score": _exit_score_fake,
    "exit_decide": _exit_decide_fake,
    "exit_compact_": _exit_compact_fake,
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _kernel(_name), "CPU")
    _library.impl(_name, _kernel(_name), "CUDA")
    torch.library.register_fake(f"sidestep::{_name}", _FAKES[_name], lib=_library)
