"""The static plan: one exit for each step of a trajectory, chosen before it begins.

An error e of the model's output at step k moves the finished latents by W_k e,

    W_k = S(lambda_k) g_k

with g_k how far the solver carries it into the latents (`carried_error.carried`) and S what is left
of that in the picture, measured. An exit errs at one step much as it did at the step before, so
that the damages of steps add up, and not only their squares. The plan is the cheapest one within
the budget E:

    minimise sum_k depth_k    subject to    sum_k W_k e_{i_k, k} <= E

Lagrange's sweep: for a price mu every step takes the exit with the least depth + mu W e; the
smallest price whose plan keeps the budget is found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidestep.runtime.exits.file import Exits
from sidestep.runtime.methods.criteria.carried_error import carried
from sidestep.runtime.methods.criterion import Course

_HALVINGS = 60


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticPlan:
    """Attributes:
    exits: ``[T]``, the exit of each step, K where no row leaves.
    damages: ``[T]``, W_k e of it, 0 where no row leaves.
    weights: ``[T]``, W_k.
    """

    exits: tuple[int, ...]
    damages: tuple[float, ...]
    weights: tuple[float, ...]


def weights_of(exits: Exits, course: Course) -> np.ndarray | None:  # [T]
    """W_k of every step; None where it is not known of the course how its lambda rises."""
    if not course.advances or exits.measured is None:
        return None
    sensitivity = exits.measured.sensitivity.double().numpy()
    return _between(exits, course, np.log(sensitivity)) * np.asarray(carried(course))


def static_plan(exits: Exits, course: Course, budget: float) -> StaticPlan | None:
    """The plan of a trajectory; None where it is not known how its lambda rises.

    Args:
        exits: Of the model.
        course: Of the trajectory.
        budget: E, the RMS error of the finished latents.
    """
    weights = weights_of(exits, course)
    if weights is None or exits.measured is None:
        return None
    errors = exits.measured.errors.double().numpy()  # [K, T']
    damages = np.stack(
        [*(weights * _between(exits, course, np.log(e)) for e in errors), 0 * weights], 1
    )  # [T, K + 1]
    chosen = cheapest(damages, (*exits.after, exits.blocks), budget)
    steps = range(len(chosen))
    return StaticPlan(
        exits=tuple(chosen),
        damages=tuple(float(damages[k, chosen[k]]) for k in steps),
        weights=tuple(weights.tolist()),
    )


def cheapest(
    damages: np.ndarray,  # [T, K + 1], of which the last is 0
    depths: Sequence[int],  # [K + 1]
    budget: float,
) -> list[int]:  # [T]
    """The choice of each step by Lagrange's sweep; without a budget nobody leaves."""
    cost = np.asarray(depths, dtype=np.float64)

    def choose(price: float) -> np.ndarray:  # [T]; of equals the deepest
        total = cost + price * damages
        return total.shape[1] - 1 - total[:, ::-1].argmin(1)

    def spent(chosen: np.ndarray) -> float:
        return float(np.take_along_axis(damages, chosen[:, None], 1).sum())

    if budget <= 0:
        return [len(depths) - 1] * len(damages)
    if spent(choose(0.0)) <= budget:
        return choose(0.0).tolist()
    tiny = damages[damages > 0].min()
    low, high = 0.0, 2 * float(cost[-1]) / tiny  # at this price nobody leaves
    for _ in range(_HALVINGS):
        middle = (low + high) / 2 if low == 0 or high / low < 4 else float(np.sqrt(low * high))
        if spent(choose(middle)) <= budget:
            high = middle
        else:
            low = middle
    return choose(high).tolist()


def _between(
    exits: Exits,
    course: Course,
    logarithms: np.ndarray,  # [T']
) -> np.ndarray:  # [T]
    """What was measured at some lambda, at those of the course: along the logarithm."""
    assert exits.measured is not None and course.log_snr is not None
    known = exits.measured.log_snr.double().numpy()
    return np.exp(np.interp(np.asarray(course.log_snr, dtype=np.float64), known, logarithms))
