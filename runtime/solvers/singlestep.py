"""Singlestep DPM-Solver and DPM-Solver++: a step of order p makes p calls and remembers nothing.

From ``s`` to ``t`` with inner points ``s_i``, and ``theta_i = (lambda_{s_i} - lambda_s) / h``:

    u1  = first order from s to s_1;                 m_1 = model(u1, s_1)
    u2  = A' x + mu'_0 m_s + mu'_1 theta_2/theta_1 (m_1 - m_s);   m_2 = model(u2, s_2)
    2S  x_t = A x + mu_0 m_s + mu_1/theta_1 (m_1 - m_s),    midpoint: mu_1 replaced by mu_0 / 2
    3S  x_t = A x + mu_0 m_s + mu_1/theta_2 (m_2 - m_s),    heun: the quadrature through both

where primes mean the step from ``s`` to ``s_2``. For the SDE the noise of the inner stages is that
of one Brownian path: what drove ``u1`` is carried on, decayed, into the later stages.

Source: DPM-Solver (Lu et al. 2022) Algorithms 1, 2, 4, 5 and Appendix D.3 ("fast"); DPM-Solver++
(Lu et al. 2022) Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sidestep.runtime.program import Form, Program
from sidestep.runtime.solvers.exponential import Integrator, V, differences, quadrature
from sidestep.runtime.solvers.problem import Point, Problem


@dataclass(frozen=True, kw_only=True)
class Singlestep:
    """What the singlestep update depends on, besides the points.

    Attributes:
        integrator: ODE or SDE, data or noise prediction.
        midpoint: The ``midpoint`` variants of 2S and 3S, else ``heun``.
    """

    integrator: Integrator
    midpoint: bool

    def stage(
        self,
        s: Point,
        target: Point,
        inner: list[Point],  # the inner points whose values are known
        values: list[V],  # m at s and at every inner point
        x: V,
        final: bool,
    ) -> V:
        """The deterministic part of one stage, from ``x`` at ``s`` to ``target``."""
        moments = self.integrator.moments(s, target, len(values))
        newest = values[0]
        total = x * self.integrator.decay(s, target) + newest * moments[0]
        return _plus(total, self.correction(s, target, inner, values, final))

    def correction(
        self, s: Point, target: Point, inner: list[Point], values: list[V], final: bool
    ) -> V | None:
        """What the inner values add to the first-order result, or None without any."""
        moments = self.integrator.moments(s, target, len(values))
        span = target.log_snr - s.log_snr
        thetas = [(point.log_snr - s.log_snr) / span for point in inner]
        older = values[1:]
        if len(thetas) == 1 and final and self.midpoint:
            moments[1] = 0.5 * moments[0]
        if len(thetas) == 2 and self.midpoint:
            thetas, older, moments = thetas[1:], older[1:], moments[:2]
        return differences(quadrature(thetas, moments), older, values[0])


def write_singlestep(
    program: Program, problem: Problem, spans: list[list[Point]], rule: Singlestep
) -> None:
    """Writes the calls of every step.

    Args:
        spans: For each step ``[s, inner points ..., t]``; its order is the length minus 1.
    """
    for span in spans:
        write_step(program, problem, span, rule)


def write_step(program: Program, problem: Problem, span: list[Point], rule: Singlestep) -> None:
    """One singlestep step; afterwards ``m1`` and ``m2`` hold its newest values, newest first."""
    integrator = rule.integrator
    s, inner = span[0], span[1:-1]
    base, path = program.register("base"), program.register("path")
    for i, (here, target) in enumerate(pairwise(span)):
        call = problem.call(here)
        m = call.value(integrator.data)
        if i == 0:
            values = [m]
            x = integrator.first_order(here, target, call.x0, call.eps)
            noise = integrator.noise(here, target) * program.noise()
            error = Form()
        else:
            values = [*(program.register(f"m{j}") for j in range(i, 0, -1)), m]
            final = i == len(span) - 2
            x = rule.stage(s, target, inner[:i], values, base, final)
            carried = integrator.decay(here, target) * path if integrator.eta else Form()
            noise = carried + integrator.noise(here, target) * program.noise()
            error = _error(rule, s, target, inner[:i], values) if final else Form()
        newest: dict[str, Any] = {f"m{j + 1}": value for j, value in enumerate(reversed(values))}
        kept_x = Program.x if i == 0 else base
        program.step(
            **call.step, x=x + noise, error=error or None, base=kept_x, path=noise, **newest
        )


def _error(rule: Singlestep, s: Point, t: Point, inner: list[Point], values: list[Form]) -> Form:
    """Order p minus order p - 1, where order 2 stands on the first inner point."""
    highest = rule.correction(s, t, inner, values, final=True) or Form()
    lower = rule.correction(s, t, inner[:-1], values[:-1], final=True) or Form()
    return highest - lower


def _plus(total: V, term: V | None) -> V:
    return total if term is None else total + term
