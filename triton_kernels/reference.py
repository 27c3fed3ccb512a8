"""The plain-torch reference of every operator: slow, short, obviously right, on any device.

The other backends are compared with it, so it spells out the order of every multiply and add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sidestep.kernels import checks, checks_exits


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
    """One solver step of every row; see `sidestep.kernels.solver_step` for the arguments.

    On CUDA a row whose step or slot is out of range is left untouched and its stats become NaN.
    """
    arguments = (registers, outputs, weights, noise, table, step, slot, model_input, stats)
    slots, R, D, _, K = checks.solver_step(*arguments)
    checks.solver_step_overlap(*arguments)
    if registers.is_cpu:
        checks.solver_step_rows(step, slot, K, slots)
    for row, k in enumerate(step.tolist()):
        owned = row if slot is None else int(slot[row])
        if not (0 <= k < K and 0 <= owned < slots):
            stats[row] = math.nan
            continue
        if D == 0:
            stats[row] = 0.0
            continue
        matrix = table[k, :-1].view(R + 1, R + 2).tolist()
        before = registers[owned].clone()  # [R, D]
        u = combine(weights[row].tolist(), [output[row].float() for output in outputs])
        z = [] if noise is None else [noise[row]]
        new = [combine(coefficients, [*before, u, *z]) for coefficients in matrix]

        stats[row, 0] = (new[0] - before[0]).abs().double().mean()
        stats[row, 1] = new[R].abs().double().mean()
        if model_input is not None:
            model_input[:, row] = (new[0] * table[k, -1]).to(model_input.dtype)
        for i in range(R):
            if matrix[i][: R + 1 + len(z)] != [float(j == i) for j in range(R + 1 + len(z))]:
                registers[owned, i] = new[i]


def combine(
    coefficients: Sequence[float],
    values: Sequence[Tensor],  # each [D] fp32
) -> Tensor:  # [D] fp32
    """sum_j c_j v_j in column order, from the first non-zero c_j on, skipping every zero c_j.

    Coefficients beyond the last value are ignored (that is how absent noise is left out).
    """
    terms = [c * v for c, v in zip(coefficients, values, strict=False) if c != 0]
    total = terms[0] if terms else torch.zeros_like(values[0])
    for term in terms[1:]:
        total = total + term
    return total


def difference_gram(
    new: Tensor,  # [n, V, D] fp32
    old: Tensor,  # [n, V, D] fp32
) -> Tensor:  # [n, V, V] fp32
    """d_i . d_j of every row; see `sidestep.kernels.difference_gram`."""
    n, V, _ = checks.difference_gram(new, old)
    gram = new.new_empty((n, V, V))
    for row in range(n):
        d = [difference(new[row, j], old[row, j]).double() for j in range(V)]
        for i in range(V):
            for j in range(V):
                gram[row, i, j] = (d[i] * d[j]).sum()
    return gram


def parareal_correct_(
    boundary: Tensor,  # [n, R, D] fp32, written
    fine: Tensor,  # [n, R, D] fp32
    new: Tensor,  # [n, R+1, D] fp32
    old: Tensor,  # [n, R+1, D] fp32
    coefficients: Tensor,  # [n, R, R+1] fp32
) -> Tensor:  # [n, 2] fp32
    """fine + C . (new - old) of every row; see `sidestep.kernels.parareal_correct_`."""
    arguments = (boundary, fine, new, old, coefficients)
    n, R, D = checks.parareal_correct_(*arguments)
    checks.parareal_correct_overlap(*arguments)
    residual = boundary.new_zeros((n, 2))
    for row in range(n):
        before = boundary[row, 0].clone()  # [D]
        d = [difference(new[row, j], old[row, j]) for j in range(R + 1)]
        for r in range(R):
            correction = torch.full_like(before, -0.0)  # -0 + v is v, for every v
            for c, d_j in zip(coefficients[row, r].tolist(), d, strict=True):
                if c != 0:
                    correction = correction + torch.where(d_j != 0, c * d_j, -0.0)
            boundary[row, r] = fine[row, r] + correction
        if D > 0:
            residual[row, 0] = (boundary[row, 0] - before).double().square().mean()
            residual[row, 1] = boundary[row, 0].double().square().mean()
    return residual


def exit_score(
    hidden: Tensor,  # [B, N, D] model dtype
    probe: Tensor,  # [k, D] fp32
    bias: Tensor,  # [B, k] fp32
    normalize: bool = True,
    sigmoid: bool = True,
    eps: float = 1e-6,
) -> Tensor:  # [B, k] fp32
    """The exit score of every row, in float64; see `sidestep.kernels.exit_score`."""
    B, N, D, k = checks_exits.exit_score(hidden, probe, bias)
    score = bias.new_zeros((B, k))
    for row in range(B if N > 0 else 0):
        h = hidden[row].double()  # [N, D]
        if normalize:
            h = functional.layer_norm(h, (D,), eps=eps)
        logits = h @ probe.double().T + bias[row].double()  # [N, k]
        score[row] = (logits.sigmoid() if sigmoid else logits).mean(0)
    return score


def exit_decide(
    score: Tensor,  # [n] fp32
    limit: Tensor,  # [n] fp32
    group: Tensor | None = None,  # [n] int64
) -> tuple[Tensor, Tensor]:  # [n] int64, [1] int64
    """Who leaves, and the order of the rest; see `sidestep.kernels.exit_decide`.

    On CUDA a row whose group is out of range stays.
    """
    n = checks_exits.exit_decide(score, limit, group)
    if score.is_cpu:
        checks_exits.exit_decide_values(group)
    groups = list(range(n)) if group is None else group.tolist()
    certain = (score <= limit).tolist()
    stay = {g for g, sure in zip(groups, certain, strict=True) if not sure or not 0 <= g < n}
    staying = [r for r in range(n) if groups[r] in stay]
    leaving = [r for r in range(n) if groups[r] not in stay]
    kept = len(staying)
    tail = iter([r for r in staying if r >= kept])
    order = [p if groups[p] in stay else next(tail) for p in range(kept)]
    return (
        torch.tensor([*order, *leaving], dtype=torch.int64, device=score.device),
        torch.tensor([kept], device=score.device),
    )


def exit_compact_(
    hidden: Tensor,  # [n, ...] model dtype, written
    out: Tensor,  # [B, ...] model dtype, written
    order: Tensor,  # [n] int64
    kept: Tensor,  # [1] int64
    place: Tensor,  # [n] int64
) -> None:
    """Moves the rows; see `sidestep.kernels.exit_compact_`."""
    _, places = checks_exits.exit_compact_(hidden, out, order, kept, place)
    checks_exits.exit_compact_overlap(hidden, out, order, kept, place)
    if hidden.is_cpu:
        checks_exits.exit_compact_values(order, kept, place, places)
    stay = int(kept)
    for r in order[stay:].tolist():
        out[place[r]] = hidden[r]
    hidden[:stay] = hidden[order[:stay]]


def difference(
    new: Tensor,  # [D] fp32
    old: Tensor,  # [D] fp32
) -> Tensor:  # [D] fp32
    """new - old, and 0 where they are equal: infinities too."""
    return torch.where(new != old, new - old, 0.0)
