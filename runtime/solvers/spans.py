"""Which calls belong to which step: `[s, inner points ..., t]` for every step of a solver."""

from __future__ import annotations

from itertools import pairwise

from sidestep.runtime.grids import Grid
from sidestep.runtime.solvers.problem import Point, Problem


def multistep_spans(
    problem: Problem, grid: Grid, calls: int, *, inverse: bool = False, two_calls: bool = False
) -> list[list[Point]]:
    """One call a step.

    Args:
        two_calls: Make a second call in the middle (in lambda) of the first step, where both its
            ends are finite.
    """
    if two_calls and calls > 1:
        points = problem.points(grid, calls - 1, inverse=inverse)
        if len(points) > 1 and points[0].finite and points[1].finite:
            spans = [list(pair) for pair in pairwise(points)]
            spans[0].insert(1, _between(problem, points[0], points[1], 1, 2))
            return spans
    return [list(pair) for pair in pairwise(problem.points(grid, calls, inverse=inverse))]


def singlestep_orders(
    calls: int, order: int, *, fast: bool = True, first_is_1: bool = False, last_is_1: bool = False
) -> list[int]:
    """The order of each step.

    Args:
        fast: Mix orders to make exactly ``calls`` calls (DPM-Solver, Appendix D.3); else only whole
            steps, ``calls // order * order`` calls.
        first_is_1: The first step has to be of order 1, because it starts at ``lambda = -inf``.
        last_is_1: The last step has to be of order 1, because it ends at ``lambda = +-inf``.
    """
    if not fast:
        return [order] * (calls // order)
    if first_is_1 and calls > 0:
        return [1, *singlestep_orders(calls - 1, order, last_is_1=last_is_1)]
    count, rest = divmod(calls, order)
    orders = [order] * count + [rest] * (rest > 0)
    if order == 3 and rest == 0 and count > 0:
        orders = [3] * (count - 1) + [2, 1]
    if last_is_1 and orders and orders[-1] != 1:
        orders = [*singlestep_orders(calls - 1, order), 1]
    return orders


def singlestep_spans(
    problem: Problem,
    grid: Grid,
    calls: int,
    order: int,
    *,
    inner: str,
    fast: bool = True,
    inverse: bool = False,
) -> list[list[Point]]:
    """The steps of a singlestep solver.

    Args:
        inner: ``grid``: every call is a grid point, and a step takes up ``order`` intervals.
            ``uniform``: a step is one interval, its inner points even in lambda. ``end``: a step is
            one interval, and its further calls are made at its end (Heun).

    Raises:
        ValueError: Whole steps (``fast=False``) cannot make these calls.
    """
    ends = problem.points(grid, calls, inverse=inverse)
    rules = {
        "fast": fast,
        "first_is_1": not ends[0].finite,
        "last_is_1": not ends[-1].finite,
    }
    if not fast and (rules["first_is_1"] or rules["last_is_1"] or calls < order):
        raise ValueError(
            f"orders 'fixed' cannot make {calls} calls of order {order} on this grid: use 'fast', "
            "more calls, or a grid between finite log-SNR"
        )
    if inner == "grid":
        whole = calls if fast else calls // order * order
        points = problem.points(grid, whole, inverse=inverse)
        orders = singlestep_orders(len(points) - 1, order, **rules)
        starts = [sum(orders[:i]) for i in range(len(orders))]
        return [points[at : at + p + 1] for at, p in zip(starts, orders, strict=True)]
    orders = singlestep_orders(calls, order, **rules)
    points = problem.points(grid, len(orders), inverse=inverse)
    orders = orders[len(orders) - len(points) + 1 :]
    spans = []
    for (s, t), p in zip(pairwise(points), orders, strict=True):
        middle = [t if inner == "end" else _between(problem, s, t, i, p) for i in range(1, p)]
        spans.append([s, *middle, t])
    return spans


def spans_from_call(spans: list[list[Point]], begin: int) -> list[list[Point]]:
    """What is left after the first ``begin`` calls; a step that is cut goes on at lower order.

    A step of Heun, ``[s, t, t]``, is cut to ``[t, t]``: the call stays and moves nothing, so that
    the calls are those of the whole plan, from number ``begin`` on.
    """
    rest = []
    for span in spans:
        left = span[begin:] if begin > 0 else span
        begin -= len(span) - 1
        if len(left) > 1:
            rest.append(left)
    return rest


def _between(problem: Problem, s: Point, t: Point, part: int, parts: int) -> Point:
    """The point a fraction ``part / parts`` of the way in lambda."""
    log_snr = s.log_snr + (t.log_snr - s.log_snr) * part / parts
    return problem.point(float(problem.schedule.t_from_log_snr(log_snr)))
