"""UniPC: a multistep predictor, and a corrector that uses the next call's value for free.

Predictor and corrector are the quadrature of `exponential` with exact moments; the corrector has
the value at the step's end, ``theta = 1``, as one more node. Where there is only one node the
published rule takes ``B_1 = B(h) / (2 theta_1)`` instead, with ``B(h) = mu_0`` (bh2) or its limit
for small h (bh1). The corrected latent exists one call later than the predicted one, so step k
first corrects ``x`` and then predicts from the corrected value. A step to ``sigma = 0`` is of
order 1.

Source: UniPC (Zhao et al. 2023), Algorithms 1 and 2, and eq. 8 to 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sidestep.runtime.program import Form, Program
from sidestep.runtime.solvers.exponential import Integrator, differences, quadrature
from sidestep.runtime.solvers.problem import Point, Problem


@dataclass(frozen=True, kw_only=True)
class UniPC:
    """What the update depends on, besides the points.

    Attributes:
        integrator: The ODE, data or noise prediction.
        order: Of the predictor, 1 to 3; the corrector is one order better.
        bh1: Whether ``B(h) = h``, else ``B(h) = mu_0``.
        corrector: Whether to correct.
    """

    integrator: Integrator
    order: int
    bh1: bool
    corrector: bool

    def weights(self, s: Point, t: Point, nodes: list[Point]) -> list[float]:
        """``B_j`` of the step from ``s`` to ``t`` with values at ``nodes``."""
        if not nodes:
            return []
        h = t.log_snr - s.log_snr
        moments = self.integrator.moments(s, t, len(nodes) + 1)
        if len(nodes) == 1:
            limit = t.alpha * h if self.integrator.data else -t.sigma * h
            moments[1] = 0.5 * (limit if self.bh1 else moments[0])
        return quadrature([(node.log_snr - s.log_snr) / h for node in nodes], moments)


def write_unipc(
    program: Program, problem: Problem, points: list[Point], rule: UniPC, *, lower_order_final: bool
) -> None:
    """Writes one step per interval; ``error`` is what the corrector changed."""
    steps, integrator = len(points) - 1, rule.integrator
    nodes: list[Point] = []
    previous_order = 0
    for k, (s, t) in enumerate(pairwise(points)):
        call = problem.call(s)
        m = call.value(integrator.data)
        older = [program.register(f"m{j + 1}") for j in range(len(nodes))]
        corrected = Program.x
        if rule.corrector and previous_order and s.finite and nodes[0].finite:
            old = nodes[:previous_order]
            weights = rule.weights(old[0], s, [*old[1:], s])
            start = program.register("start")
            correction = differences(weights, [*older[1 : len(old)], m], older[0]) or Form()
            mu_0 = integrator.moments(old[0], s, 1)[0]
            corrected = integrator.decay(old[0], s) * start + mu_0 * older[0] + correction
        finite = s.finite and t.finite
        order = min(rule.order, 1 + sum(node.finite for node in nodes)) if finite else 1
        if lower_order_final:
            order = min(order, steps - k)
        weights = rule.weights(s, t, nodes[: order - 1])
        x = _first(integrator, s, t, corrected, call.x0, call.eps, m)
        x = x + (differences(weights, older[: order - 1], m) or Form())
        newest: dict[str, Any] = {
            "m1": m,
            **{f"m{j + 2}": v for j, v in enumerate(older[: rule.order - 1])},
        }
        error = corrected - Program.x
        program.step(**call.step, x=x, error=error or None, start=corrected, **newest)
        nodes = [s, *nodes][: rule.order]
        previous_order = order


def _first(
    integrator: Integrator, s: Point, t: Point, corrected: Form, x0: Form, eps: Form, m: Form
) -> Form:
    """``A x + mu_0 m`` from the corrected latent, with the model's value at the predicted one."""
    if corrected is Program.x:
        return integrator.first_order(s, t, x0, eps)
    decay = integrator.decay(s, t)
    mu_0 = t.alpha - decay * s.alpha if integrator.data else t.sigma - decay * s.sigma
    return decay * corrected + mu_0 * m
