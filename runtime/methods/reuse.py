"""What a skipped step goes on with: weights of the outputs that were computed before it.

With the computed outputs u_0 (newest), u_1, u_2 at the coordinates c_0, c_1, c_2 of their steps,
and the coordinate c of the step that is skipped:

    hold         u_0
    linear       the line through two outputs     u_0 + (u_0 - u_1) (c - c_0) / (c_0 - c_1)
    quadratic    the parabola through three
    damped       the line with its slope times a damping in 0 .. 1 (`straightness`)
    interleave   2 u_0 - u_1 on the first skipped step, u_0 on the second, and so on in turn

Coordinates are ``lambda = ln(alpha / sigma)``, along which a model's output is smooth, or the
step's index where lambda is not known.  The last rule is ZEUS's (arXiv 2604.01552): it takes the
outputs as they come, whatever their distance, and does not extrapolate an extrapolation.

The guidance term of an output moves half like a random walk, and a line through two points of a
random walk overshoots; held, or damped, an output that does move along a line lags behind at every
step, and lags add up.  `straightness` tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sidestep.runtime.methods.criterion import Course

HISTORY = {"hold": 1, "linear": 2, "quadratic": 3, "damped": 2, "interleave": 2}
"""The rules, with the computed outputs each one looks at."""

STRAIGHT = 0.7
"""Reach in lambda below which an output moves along a line; by trial on the bundled model."""


def reuse_weights(
    rule: str,
    computed: Sequence[int],
    wanted: int,
    log_snr: Sequence[float] | None = None,
    share: float = 1.0,
) -> tuple[float, ...]:
    """Weights of the computed outputs, newest first; they add up to 1.

    Args:
        rule: One of `HISTORY`.
        computed: Steps whose outputs are kept, newest first, at least one. Where there are fewer
            than the rule looks at, the polynomial is of a lower degree.
        wanted: The step that is skipped.
        log_snr: ``[steps]`` lambda at each step, None where it is not known.
        share: What the slope is multiplied by.
    """
    steps = computed[: HISTORY[rule]]
    if rule == "interleave":
        ahead = wanted - steps[0]
        return (2.0, -1.0) if len(steps) == 2 and ahead % 2 else (1.0,)
    nodes, at = coordinates(steps, wanted, log_snr)
    weights = extrapolation_weights(nodes, at)
    return (1 + share * (weights[0] - 1), *(share * w for w in weights[1:]))


def coordinates(
    computed: Sequence[int], wanted: int, log_snr: Sequence[float] | None
) -> tuple[list[float], float]:
    """Where the steps lie: in lambda if it is known, finite and different at all of them.

    Returns:
        The coordinates of the computed steps, and that of the step wanted.
    """
    steps = [*computed, wanted]
    if log_snr is not None and max(steps) < len(log_snr):
        places = [float(log_snr[step]) for step in steps]
        if all(map(math.isfinite, places)) and len(set(places)) == len(places):
            return places[:-1], places[-1]
    return [float(step) for step in computed], float(wanted)


def extrapolation_weights(nodes: Sequence[float], at: float) -> tuple[float, ...]:
    """w_i = prod_{j != i} (c - c_j) / (c_i - c_j): Lagrange's polynomial through ``nodes`` at c."""
    return tuple(
        math.prod((at - other) / (node - other) for other in nodes if other != node)
        for node in nodes
    )


def straightness(computed: Sequence[int], wanted: int, course: Course) -> float:
    """The least damping of step ``wanted``: 1 on a short reach, 0 on a long one.

        1 / (1 + (reach / 0.7)^8),    reach: of lambda, from the older computed step to ``wanted``

    The greater of this and of the share of the last change that the line had foretold is the
    damping: on a long reach an output is taken for as straight as it was the last time. A multistep
    solver extrapolates by itself, and doubles what noise a slope has: for it, as where lambda is
    not known, the last time is all that counts.

    Args:
        computed: Steps whose outputs are kept, newest first.
        wanted: The step that is skipped.
        course: Of the trajectory.
    """
    if course.multistep or course.log_snr is None or wanted >= len(course.log_snr):
        return 0.0
    reach = abs(course.log_snr[wanted] - course.log_snr[computed[:2][-1]])
    return 1 / (1 + (min(reach, 1e9) / STRAIGHT) ** 8)
