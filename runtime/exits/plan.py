"""The static plan: what is done at each step of a trajectory, chosen before it begins.

An error e of the model's output at step k moves the finished latents by W_k e,

    W_k = S(lambda_k) g_k

with g_k how far the solver carries it into the latents (`carried_error.carried`) and S what is left
of that in the picture, measured. An exit errs at one step much as it did at the step before, so
that the damages of steps add up, and not only their squares. The plan is the cheapest one within
the budget E:

    minimise sum_k depth_k    subject to    sum_k W_k e_{i_k, k} <= E

Lagrange's sweep: for a price mu every step takes the exit with the least depth + mu W e; the
smallest price whose plan keeps the budget is found by bisection. So it is with translators alone;
`sidestep.runtime.exits.menu` has the plan in which calls are continued as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sidestep.runtime.exits.file import Exits
from sidestep.runtime.methods.criteria.carried_error import carried
from sidestep.runtime.methods.criterion import Course

NOT_CALLED = -1
"""In the place of an exit: the model is not called."""

_HALVINGS = 40

_Chosen = TypeVar("_Chosen")


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticPlan:
    """What is done at each of T steps.

    Attributes:
        exits: ``[T]``, the exit of each step, K where no row leaves, or `NOT_CALLED`.
        rests: ``[T]``, whether it is not a translator but the rest of earlier calls that takes the
            hidden states of that exit to the head.
        damages: ``[T]``, W_k e of it, 0 where no row leaves.
        weights: ``[T]``, W_k.
    """

    exits: tuple[int, ...]
    rests: tuple[bool, ...]
    damages: tuple[float, ...]
    weights: tuple[float, ...]

    def after(self, steps: int) -> StaticPlan:
        """What is left of it after so many steps."""
        return StaticPlan(
            exits=self.exits[steps:],
            rests=self.rests[steps:],
            damages=self.damages[steps:],
            weights=self.weights[steps:],
        )


def weights_of(exits: Exits, course: Course) -> np.ndarray | None:  # [T]
    """W_k of every step; None where it is not known of the course how its lambda rises.

    A multistep solver steps with an output once more at the next step (DPM-Solver++ 2M: 3/2 and
    -1/2 of it), so that its errors count twice, unless S was measured with one.
    """
    if not course.advances or exits.measured is None:
        return None
    sensitivity = exits.measured.sensitivity.double().log().numpy()
    weights = np.exp(along(exits, course, sensitivity)) * np.asarray(carried(course))
    again = course.multistep and not exits.trained.get("multistep", False)
    return 2 * weights if again else weights


def translators_plan(exits: Exits, course: Course, budget: float) -> StaticPlan | None:
    """The plan with translators alone; None where it is not known how lambda rises.

    Args:
        exits: Of the model.
        course: Of the trajectory.
        budget: E, the RMS error of the finished latents.
    """
    weights = weights_of(exits, course)
    if weights is None or exits.measured is None:
        return None
    errors = exits.measured.errors.double().log().numpy()  # [K, T']
    damages = np.stack(
        [*(weights * np.exp(along(exits, course, e)) for e in errors), 0 * weights], 1
    )  # [T, K + 1]
    chosen = cheapest(damages, (*exits.after, exits.blocks), budget)
    steps = range(len(chosen))
    return StaticPlan(
        exits=tuple(chosen),
        rests=(False,) * len(chosen),
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

    tiny = float(damages[damages > 0].min())
    return least_price(choose, spent, budget, 2 * float(cost[-1]) / tiny).tolist()


def least_price(
    choose: Callable[[float], _Chosen],
    spent: Callable[[_Chosen], float],
    budget: float,
    high: float,
) -> _Chosen:
    """What is chosen at the smallest price that keeps the budget.

    Args:
        choose: The best choice at a price of damage, in blocks.
        spent: The damage of a choice, which falls with the price.
        budget: What it may be.
        high: A price at which nobody leaves.
    """
    low = high * 1e-18
    if budget <= 0:
        return choose(high)
    if spent(choose(low)) <= budget:
        return choose(low)
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))
        if spent(choose(middle)) <= budget:
            high = middle
        else:
            low = middle
    return choose(high)


def along(
    exits: Exits,
    course: Course,
    values: np.ndarray,  # [T']
) -> np.ndarray:  # [T]
    """What was measured at some lambda, at those of the course."""
    assert exits.measured is not None and course.log_snr is not None
    known = exits.measured.log_snr.double().numpy()
    return np.interp(np.asarray(course.log_snr, dtype=np.float64), known, values)
