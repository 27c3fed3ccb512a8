"""iPNDM: DDIM's step with the noise prediction of an Adams-Bashforth formula of order up to 4.

``x_t = A x_s + (sigma_t - A sigma_s) sum_j c_j eps_j``, with ``A = alpha_t / alpha_s`` and the
weights ``c`` of equal steps, whatever the steps are. It needs no lower order towards ``sigma = 0``.

Source: DEIS (Zhang and Chen 2022), section 3.3 and Appendix C, after PNDM (Liu et al. 2022).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from sidestep.runtime.program import Form, Program
from sidestep.runtime.solvers.exponential import Integrator, differences
from sidestep.runtime.solvers.problem import Point, Problem

ADAMS_BASHFORTH: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def write_ipndm(
    program: Program, problem: Problem, points: list[Point], order: int, *, lower_order_final: bool
) -> None:
    """Writes one step per interval."""
    integrator = Integrator(data=False)
    known, steps = 0, len(points) - 1
    for k, (s, t) in enumerate(pairwise(points)):
        call = problem.call(s)
        current = min(order, known + 1, steps - k if lower_order_final else order)
        older = [program.register(f"m{j + 1}") for j in range(known)]
        x = integrator.first_order(s, t, call.x0, call.eps)
        error = Form()
        if current > 1:
            weight = t.sigma - integrator.decay(s, t) * s.sigma
            terms = [
                (differences(c[1:], older[: len(c) - 1], call.eps) or Form()) * weight
                for c in ADAMS_BASHFORTH[current - 2 : current]
            ]
            x, error = x + terms[1], terms[1] - terms[0]
        kept: dict[str, Any] = {
            "m1": call.eps,
            **{f"m{j + 2}": v for j, v in enumerate(older[: order - 2])},
        }
        program.step(**call.step, x=x, error=error or None, **kept)
        known = min(known + 1, order - 1)
