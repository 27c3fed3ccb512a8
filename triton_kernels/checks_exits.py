"""Validation of the exit operators, as in `checks`."""

from __future__ import annotations

import torch
from torch import Tensor

from sidestep.kernels.checks import MODEL_DTYPE_NAMES, MODEL_DTYPES
from sidestep.kernels.refusals import check, refuse_overlap, refuse_shape

MAX_WIDTH = 16384  # of a token: what the Triton kernel holds in registers


def exit_score(
    hidden: Tensor,  # [B, N, D] model dtype
    probe: Tensor,  # [k, D] fp32
    bias: Tensor,  # [B, k] fp32
) -> tuple[int, int, int, int]:
    """Checks shapes, dtypes, devices and layout; returns the sizes (B, N, D, k).

    Raises:
        ValueError: a shape, device or layout is wrong.
        TypeError: a dtype is wrong.
    """
    shape = hidden.shape
    if len(shape) != 3 or not 1 <= shape[2] <= MAX_WIDTH:
        expected = f"[B, N, D] with D in 1..{MAX_WIDTH}"
        refuse_shape("exit_score", "hidden", hidden, expected)
    B, N, D = shape
    if hidden.dtype not in MODEL_DTYPES:
        raise TypeError(
            f"exit_score: hidden has dtype {hidden.dtype}, expected {MODEL_DTYPE_NAMES}"
        )
    if D > 1 and B * N > 0 and hidden.stride(2) != 1:
        raise ValueError(
            f"exit_score: hidden has strides {list(hidden.stride())}, expected a last one of 1"
        )
    if len(probe.shape) != 2 or probe.shape[0] < 1:
        refuse_shape("exit_score", "probe", probe, f"[k, {D}] with k at least 1")
    k = probe.shape[0]
    check("exit_score", {"probe": (probe, (k, D)), "bias": (bias, (B, k))}, ("hidden", hidden))
    return B, N, D, k


def exit_decide(
    score: Tensor,  # [n] fp32
    limit: Tensor,  # [n] fp32
    group: Tensor | None,  # [n] int64
) -> int:
    """Checks shapes, dtypes, devices and contiguity; returns n.

    Raises:
        ValueError: a shape, device or layout is wrong.
        TypeError: a dtype is wrong.
    """
    if len(score.shape) != 1:
        refuse_shape("exit_decide", "score", score, "[n]")
    n = score.shape[0]
    check("exit_decide", {"score": (score, (n,)), "limit": (limit, (n,))})
    if group is not None:
        check("exit_decide", {"group": (group, (n,))}, ("score", score), torch.int64)
    return n


def exit_decide_values(group: Tensor | None) -> None:  # [n] int64
    """Checks the values of group (the native library does so by itself).

    Raises:
        ValueError: a group is out of range.
    """
    numbers = [] if group is None else group.tolist()
    for r, g in enumerate(numbers):
        if not 0 <= g < len(numbers):
            raise ValueError(
                f"exit_decide: group[{r}] is {g}, expected 0 <= group < {len(numbers)}"
            )


def exit_compact_(
    hidden: Tensor,  # [n, ...] model dtype
    out: Tensor,  # [B, ...] model dtype
    order: Tensor,  # [n] int64
    kept: Tensor,  # [1] int64
    place: Tensor,  # [n] int64
) -> tuple[int, int]:
    """Checks shapes, dtypes, devices and contiguity; returns the sizes (n, B).

    Raises:
        ValueError: a shape, device or layout is wrong.
        TypeError: a dtype is wrong.
    """
    operation, shape = "exit_compact_", hidden.shape
    if len(shape) < 1:
        refuse_shape(operation, "hidden", hidden, "[n, ...]")
    if hidden.dtype not in MODEL_DTYPES:
        raise TypeError(
            f"{operation}: hidden has dtype {hidden.dtype}, expected {MODEL_DTYPE_NAMES}"
        )
    if len(out.shape) != len(shape) or out.shape[1:] != shape[1:]:
        refuse_shape(operation, "out", out, f"[B, {', '.join(map(str, shape[1:]))}]")
    rows = {"hidden": (hidden, shape), "out": (out, out.shape)}
    check(operation, rows, ("hidden", hidden), hidden.dtype)
    n = shape[0]
    indices = {"order": (order, (n,)), "kept": (kept, (1,)), "place": (place, (n,))}
    check(operation, indices, ("hidden", hidden), torch.int64)
    return n, out.shape[0]


def exit_compact_overlap(
    hidden: Tensor,  # [n, ...] model dtype
    out: Tensor,  # [B, ...] model dtype
    order: Tensor,  # [n] int64
    kept: Tensor,  # [1] int64
    place: Tensor,  # [n] int64
) -> None:
    """Checks that what is written overlaps nothing else (the native library does so by itself).

    Raises:
        ValueError: hidden or out overlaps another argument.
    """
    read = {"order": order, "kept": kept, "place": place}
    refuse_overlap("exit_compact_", {"hidden": hidden, "out": out}, read)


def exit_compact_values(
    order: Tensor,  # [n] int64
    kept: Tensor,  # [1] int64
    place: Tensor,  # [n] int64
    places: int,
) -> None:
    """Checks the values of order, kept and place (the native library does so by itself).

    Raises:
        ValueError: order and kept are not what `exit_decide` returns, or a place is out of range
            or given twice.
    """
    n, stay = len(order), int(kept)
    if not 0 <= stay <= n:
        raise ValueError(f"exit_compact_: kept is {stay}, expected 0 <= kept <= {n}")
    rows: set[int] = set()
    taken: set[int] = set()
    for p, r in enumerate(order.tolist()):
        _refuse_index("exit_compact_", "order", p, r, n, rows)
        if p < stay and r != p and r < stay:
            raise ValueError(
                f"exit_compact_: order[{p}] is {r}, expected {p} or one from kept = {stay} on"
            )
        if p >= stay:
            _refuse_index("exit_compact_", "place", r, int(place[r]), places, taken)


def _refuse_index(operation: str, name: str, i: int, value: int, end: int, seen: set[int]) -> None:
    """Refuses what is out of range or was there before, and remembers it."""
    if not 0 <= value < end:
        raise ValueError(f"{operation}: {name}[{i}] is {value}, expected 0 <= {name} < {end}")
    if value in seen:
        raise ValueError(f"{operation}: {name} holds {value} twice, expected every one once")
    seen.add(value)
