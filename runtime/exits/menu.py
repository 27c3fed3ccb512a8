"""The static plan over the whole menu: not to call the model, to leave early, to go through.

What lies behind exit i, r_i = h_L - h_i, changes slowly from step to step. With it of the last two
whole calls, at lambda_a < lambda_b, a row that leaves at lambda goes on with

    h' = h_i + (1 + w) r_i(b) - w r_i(a),        w = (lambda - lambda_b) / (lambda_b - lambda_a)

in place of a translator's (its rest is continued; FirstBlockCache is exit 1 with w = 0). Exit -1 is
before the first block: the model is not called, and its last two outputs are continued likewise.
Either errs the more, the farther away what is continued was seen, as was measured,

    e_i(d) = stale_i d^growth_i        d: lambda since the last whole call; for exit -1, since
                                       the last call, whose own error comes 1 + w times on top

The plan minimises  sum_k depth_k + mu W_k e_k  over all sequences of choices, exactly, going back
from the last step: what a choice costs later depends only on how many steps ago the model was last
run whole, how many steps ago it was called at all, and where that call ended. Before the first two
whole calls rows leave with a translator or not at all. mu is the smallest price whose plan keeps
the budget (`sidestep.runtime.exits.plan`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from sidestep.runtime.exits.file import Exits
from sidestep.runtime.exits.modules import clamp_log_snr
from sidestep.runtime.exits.plan import NOT_CALLED, StaticPlan, along, least_price, weights_of
from sidestep.runtime.exits.rests import slope
from sidestep.runtime.methods.criterion import Course

LONGEST = 8
"""G: most steps from one whole call to the next, once there was one."""


class Choice(NamedTuple):
    """What is done at a step: the exit, whether its rest is continued, and W_k e."""

    exit: int
    rest: bool
    damage: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Costs:
    """What every choice at every step of a course costs, of K exits.

    Attributes:
        depths: ``[K + 1]`` blocks of every exit, and of the whole model.
        translated: ``[T, K]`` damage.
        rest: ``[T, G, K]`` damage, by the steps between this one and the last whole call.
        reused: ``[T, G, G, K + 1]`` damage, by them, by the steps between this one and the last
            call, and by the exit of that one, K for the whole model.
    """

    depths: np.ndarray
    translated: np.ndarray
    rest: np.ndarray
    reused: np.ndarray

    @property
    def least(self) -> float:
        """The smallest damage above 0."""
        each = (self.translated, self.rest, self.reused)
        return min(float(d[d > 0].min(initial=np.inf)) for d in each)


def menu_plan(exits: Exits, course: Course, budget: float, *, reuse: bool) -> StaticPlan | None:
    """The plan of a trajectory; None where it is not known how its lambda rises.

    Args:
        exits: Of the model.
        course: Of the trajectory.
        budget: E, the RMS error of the finished latents.
        reuse: Whether there may be steps at which the model is not called.
    """
    weights = weights_of(exits, course)
    if weights is None:
        return None
    costs = costs_of(exits, course, weights, reuse=reuse)
    choices = least_price(
        lambda price: cheapest_course(costs, price),
        lambda choices: sum(choice.damage for choice in choices),
        budget,
        2 * exits.blocks / costs.least,
    )
    return StaticPlan(
        exits=tuple(choice.exit for choice in choices),
        rests=tuple(choice.rest for choice in choices),
        damages=tuple(choice.damage for choice in choices),
        weights=tuple(weights.tolist()),
    )


def costs_of(
    exits: Exits,
    course: Course,
    weights: np.ndarray,  # [T]
    *,
    reuse: bool,
) -> Costs:
    """The costs of a course, W_k given."""
    measured, K = exits.measured, len(exits.after)
    assert measured is not None and course.log_snr is not None
    snr = clamp_log_snr(torch.tensor(course.log_snr)).double().numpy()
    errors, stale = (
        np.exp([along(exits, course, row) for row in tensor.double().log().numpy()])
        for tensor in (measured.errors, measured.stale)
    )  # [K, T], [K + 1, T]
    growth = np.stack([along(exits, course, row) for row in measured.growth.double().numpy()])
    times = snr.tolist()
    rest = np.full((len(snr), LONGEST, K), np.inf)
    reused = np.full((len(snr), LONGEST, LONGEST, K + 1), np.inf)
    for k, weight in enumerate(weights):
        error = {ago: stale[:, k] * (snr[k] - snr[k - 1 - ago]) ** growth[:, k]
                 for ago in range(min(k, LONGEST))}  # fmt: skip
        for whole in error:
            rest[k, whole] = weight * error[whole][1:]
            for last in range(whole if reuse else 0):
                b = k - 1 - last
                own = rest[b, whole - last - 1] / weights[b] * (1 + slope(times, k, b, b - 1))
                reused[k, whole, last, :K] = weight * (error[last][0] + own)
            if reuse:
                reused[k, whole, whole, K] = weight * error[whole][0]
    depths = np.array([*exits.after, exits.blocks], float)
    return Costs(depths=depths, translated=(weights * errors).T, rest=rest, reused=reused)


def cheapest_course(costs: Costs, price: float) -> list[Choice]:  # [T]
    """The choices with the least  sum_k depth_k + price W_k e_k; of equals the deepest."""
    translated = costs.depths[:-1] + price * costs.translated  # [T, K]
    before = translated.min(1, initial=np.inf)  # [T]
    ahead = _ahead(costs, price)
    T, K, whole = len(before), len(costs.depths) - 1, float(costs.depths[-1])
    totals = [
        before[:begin].sum() + whole * min(2, T - begin) + ahead[min(begin + 2, T)][0, 0, K]
        for begin in range(T + 1)
    ]  # by the step of the first whole call
    begin = int(np.argmin(totals))
    choices = [
        Choice(exit, False, float(costs.translated[k, exit]))
        for k, exit in enumerate(K - 1 - translated[:begin, ::-1].argmin(1))
    ]
    choices += [Choice(K, False, 0.0)] * min(2, T - begin)
    state = (0, 0, K)
    while len(choices) < T:
        choice, state = _next(costs, price, ahead, len(choices), state)
        choices.append(choice)
    return choices


def _ahead(costs: Costs, price: float) -> list[np.ndarray]:  # [T + 1] of [G, G, K + 1]
    """The least cost from every step on, by the state that `Costs.reused` is told apart by."""
    K = len(costs.depths) - 1
    ahead = [np.zeros(costs.reused.shape[1:])]
    for rest, reused in zip(costs.rest[::-1], costs.reused[::-1], strict=True):
        later = np.full_like(ahead[-1], np.inf)
        later[:-1] = ahead[-1][1:]  # one more step since the last whole call
        uncalled = np.full_like(later, np.inf)
        uncalled[:, :-1] = later[:, 1:]  # and since the last call
        leaving = (costs.depths[:K] + price * rest + later[:, 0, :K]).min(1)  # [G]
        whole = costs.depths[K] + ahead[-1][0, 0, K]
        best = np.minimum(price * reused + uncalled, leaving[:, None, None])
        ahead.append(np.minimum(best, whole))
    return ahead[::-1]


def _next(
    costs: Costs,
    price: float,
    ahead: list[np.ndarray],
    k: int,
    state: tuple[int, int, int],
) -> tuple[Choice, tuple[int, int, int]]:
    """What is done at step k in a state, and the state after it."""
    whole, last, ended = state
    later, K, room = ahead[k + 1], len(costs.depths) - 1, whole + 1 < LONGEST
    options = [(float(costs.depths[K] + later[0, 0, K]), Choice(K, False, 0.0), (0, 0, K))]
    for exit in range(K - 1, -1, -1) if room else ():
        damage = float(costs.rest[k, whole, exit])
        cost = costs.depths[exit] + price * damage + later[whole + 1, 0, exit]
        options.append((float(cost), Choice(exit, True, damage), (whole + 1, 0, exit)))
    if room:
        damage = float(costs.reused[k, whole, last, ended])
        cost = price * damage + later[whole + 1, last + 1, ended]
        left_out = Choice(NOT_CALLED, False, damage)
        options.append((float(cost), left_out, (whole + 1, last + 1, ended)))
    _, choice, after = min(options, key=lambda option: option[0])
    return choice, after
