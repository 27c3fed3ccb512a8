"""Heun's method in ``sigma / alpha``: the trapezoidal rule, two calls a step.

With ``y = x / alpha`` and ``s = sigma / alpha`` the ODE is ``dy / ds = eps``. Euler's step to ``t``
is DDIM's; a second call there gives ``y_t = y_s + (s_t - s_s) (eps_s + eps_t) / 2``. A step to
``sigma = 0`` is Euler's.

Source: EDM (Karras et al. 2022), Algorithm 1.
"""

from __future__ import annotations

from sidestep.runtime.program import Program
from sidestep.runtime.solvers.exponential import Integrator
from sidestep.runtime.solvers.problem import Point, Problem


def write_heun(program: Program, problem: Problem, spans: list[list[Point]]) -> None:
    """Writes the calls of every step.

    Args:
        spans: ``[s, t]`` for a step of Euler, ``[s, t, t]`` for one of Heun, and ``[t, t]`` for the
            call that is left of a step of Heun that was cut.
    """
    integrator = Integrator(data=False)
    for span in spans:
        s, t = span[0], span[-1]
        call = problem.call(s)
        x = Program.x if s == t else integrator.first_order(s, t, call.x0, call.eps)
        program.step(**call.step, x=x, slope=call.eps)
        if len(span) == 3:
            end = problem.call(t)
            half = 0.5 * (t.sigma - integrator.decay(s, t) * s.sigma)
            error = half * (end.eps - program.register("slope"))
            program.step(**end.step, x=Program.x + error, error=error)
