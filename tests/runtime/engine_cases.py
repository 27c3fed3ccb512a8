"""Small models, plans and the plain loop that the engine's results are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestep.kernels import PreparedStep
from sidestep.runtime.engine import Batch, Engine, Request, Result
from sidestep.runtime.plan import Plan
from sidestep.runtime.schedules import DiscreteVP
from sidestep.runtime.solvers import find_solver

SHAPE = (3, 5)
SCHEDULE = DiscreteVP.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SOLVERS = ("ddim", "dpmsolver++2m", "dpmsolver++3s", "sde-dpmsolver++2m", "unipc2", "euler")


def plan_of(solver: str, steps: int) -> Plan:
    return find_solver(solver).plan(SCHEDULE, "linspace", steps)


def latents(seed: int, n: int, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    """Element by element, so that a row's output is the same bits in any batch."""
    wide = [-1] + [1] * (x.ndim - 1)
    return (x * 0.8 + shift.view(wide) * 0.1).clamp(-3, 3) - x.abs() * 0.05 + t.view(wide) * 1e-4


def model(batch: Batch) -> Tensor:
    return network(batch.x, batch.t, batch.conditioning["shift"])


def conditioning(seed: int, n: int, branches: int) -> dict[str, Tensor]:
    return {"shift": latents(seed + 1000, branches * n, ())}


def run(engine: Engine, call: Callable[[Batch], Tensor] = model) -> dict[int, Result]:
    for batch in engine:
        engine.complete(batch, call(batch))
    return {result.id: result for result in engine.results()}


def solo(request: Request, **settings: Any) -> Result:
    """The same request in an engine of its own."""
    engine = Engine(request.x.shape[1:], **{"capacity": len(request.x)} | settings)
    engine.submit(request)
    (result,) = run(engine).values()
    return result


def loop(request: Request) -> Tensor:
    """A serial request by hand: the model on all rows, then the fused step, K times."""
    plan, x = request.plan, request.x
    n, size = len(x), x[0].numel()
    registers = torch.zeros(n, plan.registers, size)
    registers[:, 0] = x.reshape(n, size)
    weights = torch.tensor([request.guidance] * n)
    branches = weights.shape[1]
    step = torch.zeros(n, dtype=torch.int64)
    take = PreparedStep(registers, weights, plan.table(), step, None, torch.zeros(n, 2))
    times, scales = torch.tensor(plan.timesteps).float(), torch.tensor(plan.input_scales).float()
    for k in range(len(plan)):
        x_in = (registers[:, 0] * scales[k]).view(n, *x.shape[1:])
        t = times[k].expand(branches * n)
        output = network(torch.cat([x_in] * branches), t, request.conditioning["shift"])
        drawn = None
        if request.noise is not None:
            used = plan.used_draw(k)
            drawn = None if used is None else request.noise[k, used]  # type: ignore[index]
        take(output, drawn)
        step.add_(1)
    return registers[:, 0].view(x.shape).clone()


def requests(count: int, methods: Sequence[Any] = (None,), **changes: Any) -> list[Request]:
    """Requests of different plans, steps, rows, guidance and methods, each from its own seed."""
    made = []
    for i in range(count):
        plan = plan_of(SOLVERS[i % len(SOLVERS)], 5 + 3 * i % 11)
        n, branches = 1 + i % 3, 1 + i % 2
        noise = None
        if plan.stochastic:
            noise = latents(i + 50, len(plan) * plan.noise_columns * n).view(
                len(plan), plan.noise_columns, n, *SHAPE
            )
        made.append(
            Request(
                plan,
                plan.initial_scale * latents(i, n),
                conditioning(i, n, branches),
                guidance=(1.0,) if branches == 1 else (-1.5, 2.5),
                method=methods[i % len(methods)],
                noise=noise,
                tag=i,
                **changes,
            )
        )
    return made
