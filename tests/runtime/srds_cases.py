"""Requests with SRDS, for its tests."""

from __future__ import annotations

from typing import Any

from engine_cases import conditioning, latents, plan_of, solo

from sidestep.runtime.engine import Request, Result


def request_of(solver: str, steps: int, method: Any, n: int = 1, seed: int = 3) -> Request:
    plan = plan_of(solver, steps)
    x = plan.initial_scale * latents(seed, n)
    return Request(plan, x, conditioning(seed, n, 2), guidance=(-1.5, 2.5), method=method)


def parallel(request: Request, rows: int = 64, **settings: Any) -> Result:
    return solo(request, capacity=rows, buckets=range(1, 2 * rows + 1), **settings)
