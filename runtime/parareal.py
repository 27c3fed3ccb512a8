"""SRDS in plain torch: the definition that the engine's parallel one is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.runtime.methods.coarse import COARSE, Hold
from sidestep.runtime.plan import Model, Noise, Plan


def parareal(
    plan: Plan,
    model: Model,
    x: Tensor,  # [n, ...]
    bounds: Sequence[int],  # [B + 1]
    iterations: int,
    *,
    coarse: str = "krylov",
    noise: Noise | None = None,  # [K, J, n, ...] or noise(k, j) -> [n, ...]
) -> list[list[Tensor]]:
    """All iterates of the formula in `sidestep.runtime.methods.srds`, one block after the other.

    Args:
        plan: The sampler, R registers.
        model: ``model(x_in, t) -> u`` as for `Plan.run`.
        x: ``[n, ...]``, the start, in any floating dtype.
        bounds: ``[B + 1]``, where the blocks begin and end.
        iterations: K.
        coarse: The coarse solver, a name in ``COARSE``.
        noise: As for `Plan.run`.

    Returns:
        ``[K + 1][B + 1]`` of ``[n, R, ...]``: the state at every boundary in every iterate.
    """
    solver = COARSE[coarse](plan, bounds, x.device)
    blocks, count = range(1, len(bounds)), len(x)
    start = torch.cat([x[:, None], x.new_zeros(count, plan.registers - 1, *x.shape[1:])], 1)

    def evaluate(state: Tensor, k: int) -> Tensor:
        return model(plan.input_scales[k] * state[:, 0], float(plan.timesteps[k]))

    def seen(state: Tensor, block: int) -> Tensor:  # [n, R + 1, ...]
        return torch.cat([state, evaluate(state, bounds[block - 1])[:, None]], 1)

    def fine(inputs: Tensor, block: int) -> Tensor:  # [n, R, ...]
        state = step(plan, bounds[block - 1], inputs[:, :-1], inputs[:, -1], noise)
        for k in range(bounds[block - 1] + 1, bounds[block]):
            state = step(plan, k, state, evaluate(state, k), noise)
        return state

    iterate, inputs = [start], [start]
    for block in blocks:
        inputs.append(seen(iterate[-1], block))
        guessed = acted(solver, inputs, block, first=True)
        iterate.append(apply(solver.start([block - 1] * count), guessed))
    iterates = [iterate]
    for p in range(1, iterations + 1):
        ends = {block: fine(inputs[block], block) for block in blocks if block >= p}
        iterate, last = [*iterate[:p], *(ends[b] for b in blocks if b == p)], inputs
        inputs = list(inputs)
        for block in blocks:
            if block > p:
                inputs[block] = seen(iterate[-1], block)
                change = acted(solver, inputs, block) - acted(solver, last, block)
                flat = change.flatten(2)
                correction = solver.correction([block - 1] * count, flat @ flat.mT)
                iterate.append(ends[block] + apply(correction, change))
        iterates.append(iterate)
    return iterates


def acted(
    solver: Hold,
    inputs: Sequence[Tensor],  # [B + 1] of [n, R + 1, ...]
    block: int,
    *,
    first: bool = False,
) -> Tensor:  # [n, R + 1, ...]
    """What the coarse solver acts on: the inputs of a block, or what it makes of the last two.

    Args:
        solver: That corrects.
        inputs: Of all blocks in one iterate, ``[registers; u]`` at their starts.
        block: Counted from 1.
        first: Whether it is to guess rather than to correct.
    """

    def value(i: int) -> Tensor:
        return solver.value(i - 1, inputs[i][:, 0], inputs[i][:, -1])

    if not (solver.looks_back if first else solver.throughout):
        return inputs[block]
    output = solver.ahead(block - 1, value(block), value(block - 1) if block > 1 else None)
    return torch.cat([inputs[block][:, :-1], output[:, None]], 1)


def step(
    plan: Plan,
    k: int,
    state: Tensor,  # [n, R, ...]
    u: Tensor,  # [n, ...]
    noise: Noise | None,
) -> Tensor:  # [n, R, ...]
    """Step ``k`` of the plan."""
    columns, used = [*range(plan.registers + 1)], plan.used_draw(k) if noise is not None else None
    terms = [*state.unbind(1), u]
    if used is not None and noise is not None:
        columns.append(plan.registers + 1 + used)
        terms.append(noise(k, used) if callable(noise) else noise[k, used])
    matrix = torch.tensor(plan.matrices[k][:, columns], dtype=u.dtype, device=u.device)
    return apply(matrix.expand(len(u), -1, -1), torch.stack(terms, 1))


def apply(
    matrices: Tensor,  # [n, R, V]
    vectors: Tensor,  # [n, V, ...]
) -> Tensor:  # [n, R, ...]
    """One matrix a row."""
    return (matrices.to(vectors.dtype) @ vectors.flatten(2)).view(
        len(vectors), -1, *vectors.shape[2:]
    )
