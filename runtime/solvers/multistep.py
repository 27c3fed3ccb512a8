"""Multistep DPM-Solver and DPM-Solver++: one call a step, earlier calls remembered.

With ``m_0`` the newest value, at ``s``, and older ones at ``theta_j = (lambda_j - lambda_s) / h``,

    x_t = A x + mu_0 m_0 + sum_j B_j (m_j - m_0) + C z,   B the quadrature of `exponential`

up to order 3. Two published deviations from the exact moments are kept as options: ``midpoint``
replaces ``mu_1`` by ``mu_0 / 2`` at order 2, and ``third_order="shipped"`` halves ``mu_2``, as the
official code, diffusers and k-diffusion do; it is of second order, and often better below 50 calls.

Source: DPM-Solver++ (Lu et al. 2022), Algorithm 2 (2M); the official code for 3M and the SDE forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sidestep.runtime.program import Form, Program
from sidestep.runtime.solvers.exponential import Integrator, differences, quadrature
from sidestep.runtime.solvers.problem import Point, Problem


@dataclass(frozen=True, kw_only=True)
class Multistep:
    """What the multistep update depends on, besides the points.

    Attributes:
        integrator: ODE or SDE, data or noise prediction.
        order: 1 to 3.
        midpoint: The ``midpoint`` variant at order 2, else ``heun``.
        true_third: Whether order 3 has the full second moment.
    """

    integrator: Integrator
    order: int
    midpoint: bool
    true_third: bool

    def weights(self, s: Point, t: Point, nodes: list[Point], order: int) -> list[float]:
        """``B_1 .. B_{order-1}`` of the step from ``s`` to ``t`` with older values at ``nodes``."""
        if order == 1:
            return []
        h = t.log_snr - s.log_snr
        moments = self.integrator.moments(s, t, order)
        if order == 2 and self.midpoint:
            moments[1] = 0.5 * moments[0]
        if order == 3 and not self.true_third:
            moments[2] *= 0.5
        thetas = [(node.log_snr - s.log_snr) / h for node in nodes[: order - 1]]
        return quadrature(thetas, moments)


def write_multistep(
    program: Program,
    problem: Problem,
    points: list[Point],
    rule: Multistep,
    *,
    lower_order_final: bool,
    nodes: list[Point] | None = None,
) -> None:
    """Writes one step per interval.

    Args:
        lower_order_final: Whether the order falls to 1 towards the end.
        nodes: Where the values in registers ``m1, m2`` were taken, newest first, if any.
    """
    nodes = list(nodes or [])
    steps = len(points) - 1
    for k, (s, t) in enumerate(pairwise(points)):
        order = min(rule.order, 1 + len(nodes))
        if lower_order_final:
            order = min(order, steps - k)
        if not (s.finite and t.finite):
            order = 1
        call = problem.call(s)
        m = call.value(rule.integrator.data)
        older = [program.register(f"m{j + 1}") for j in range(len(nodes))]
        x = rule.integrator.first_order(s, t, call.x0, call.eps)
        correction = _correction(rule, s, t, nodes, older, m, order)
        error = correction - _correction(rule, s, t, nodes, older, m, order - 1)
        x = x + correction + rule.integrator.noise(s, t) * program.noise()
        kept: dict[str, Any] = {
            "m1": m,
            **{f"m{j + 2}": value for j, value in enumerate(older[: rule.order - 2])},
        }
        program.step(**call.step, x=x, error=error or None, **kept)
        nodes = [s, *nodes][: rule.order - 1] if s.finite else []


def _correction(
    rule: Multistep,
    s: Point,
    t: Point,
    nodes: list[Point],
    older: list[Form],
    m: Form,
    order: int,
) -> Form:
    """``sum_j B_j (m_j - m_0)``; nothing at order 1 and below."""
    weights = rule.weights(s, t, nodes, order) if order > 1 else []
    return differences(weights, older[: len(weights)], m) or Form()
