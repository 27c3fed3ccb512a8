"""What a criterion is told of a plan, found out from the plan itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sidestep.runtime.methods.criterion import Course
from sidestep.runtime.plan import Plan
from sidestep.runtime.predictions import PREDICTIONS

_CANDIDATES = ("epsilon", "v_prediction", "flow_prediction", "sample")
_TOLERANCE = 1e-4  # relative: schedulers compute in float32


def plan_course(plan: Plan, rows: int = 0) -> Course:
    """The course of ``rows`` rows that run the plan."""
    return Course(
        rows=rows,
        steps=len(plan),
        log_snr=rising(plan.log_snr),
        prediction=infer_prediction(plan) or ("edm" if _is_edm(plan) else None),
        multistep=plan.registers > 1,
    )


def rising(
    log_snr: np.ndarray | None,  # [K]
) -> tuple[float, ...] | None:
    """lambda as a `Course` has it; None where it falls: an inversion goes from picture to noise."""
    if log_snr is None or (log_snr[1:] < log_snr[:-1]).any():
        return None
    return tuple(log_snr.tolist())


@lru_cache(maxsize=64)
def infer_prediction(plan: Plan) -> str | None:
    """The prediction type that the plan's matrices were made for, from ``PREDICTIONS``.

    Where the data prediction x0 and the noise prediction eps are both constant, every consistent
    solver of the ODE follows ``x = alpha x0 + sigma eps`` exactly. The plan is run on the one
    number with x0 = 1 and eps = 3 and the output that each type would have there; the right type
    stays on the line. With l = lambda, alpha is ``1 / sqrt(1 + e^-2l)`` in a variance preserving
    plan, 1 in an exploding one, and ``1 / (1 + e^-l)`` in a flow's.

    Returns:
        Its name; None where no type fits, or two do, where the plan does not know its lambda, and
        for a stochastic plan, which leaves the line.
    """
    names = {name for name, _ in _lines(plan)}
    return names.pop() if len(names) == 1 else None


def data_maps(plan: Plan) -> np.ndarray | None:  # [K, 2]
    """``x0 = a x + b u`` at every step, x being register 0, by the type that is inferred.

    None where there is none (`infer_prediction`), or where an output does not tell x0: b is 0.
    """
    name = infer_prediction(plan)
    if name is None or plan.log_snr is None:
        return None
    found = np.array(_maps(plan, name, _lines(plan)[0][1], _noise(plan.log_snr)))
    return found if np.isfinite(found).all() and found[:, 1].all() else None


def _lines(plan: Plan) -> list[tuple[str, np.ndarray]]:
    """The prediction types whose constant outputs stay on the line, each with its alpha ``[K]``."""
    if plan.log_snr is None or not _can_tell(plan):
        return []
    noise = _noise(plan.log_snr)
    alphas = (1 / np.hypot(1, noise), np.ones_like(noise), 1 / (1 + noise))
    pairs = [(name, alpha) for name in _CANDIDATES for alpha in alphas]
    return [
        (name, alpha)
        for name, alpha in pairs
        if _keeps(plan, _maps(plan, name, alpha, noise), alpha * (1 + 3 * noise))
    ]


@lru_cache(maxsize=64)
def _is_edm(plan: Plan) -> bool:
    """Whether the model is one with EDM's preconditioning around it, of either sign of c_out.

    No prediction type of its own for what SRDS makes of a plan.
    """
    if plan.log_snr is None or not _can_tell(plan):
        return False
    noise, edm = _noise(plan.log_snr), PREDICTIONS["edm"]
    if not np.allclose(plan.input_scales, [edm.input_scale(sigma) for sigma in noise], rtol=1e-4):
        return False
    maps = [edm.data(1.0, sigma) for sigma in noise.tolist()]
    other = [(a, -b) for a, b in maps]
    return _keeps(plan, maps, 1 + 3 * noise) or _keeps(plan, other, 1 + 3 * noise)


def _can_tell(plan: Plan) -> bool:
    return len(plan) > 1 and not plan.threshold and not plan.stochastic


def _maps(
    plan: Plan,
    name: str,
    alpha: np.ndarray,  # [K]
    noise: np.ndarray,  # [K]
) -> list[tuple[float, float]]:
    """``x0 = a x + b u`` at every step, x being register 0."""
    maps = []
    for k, scale in enumerate(plan.input_scales.tolist()):  # the model reads scale * x
        a, b = PREDICTIONS[name].data(scale * alpha[k], scale * alpha[k] * noise[k])
        maps.append((a * scale, b))
    return maps


def _noise(
    log_snr: np.ndarray,  # [K]
) -> np.ndarray:  # [K]
    """``sigma / alpha``."""
    ratio: np.ndarray = np.exp(-np.maximum(log_snr, -30.0))
    return ratio


def _keeps(
    plan: Plan,
    maps: Sequence[tuple[float, float]],  # [K]
    line: np.ndarray,  # [K]
) -> bool:
    """Whether x0 = 1 keeps the latent on ``line``, alpha x0 + sigma eps with eps = 3."""
    state = np.zeros(plan.registers)
    state[0] = line[0]
    for k in range(len(plan) - 1):
        a, b = maps[k]
        u = (1 - a * line[k]) / b  # of x0 = a x + b u
        state = plan.matrices[k, :, : plan.registers + 1] @ [*state, u]
        if not math.isclose(state[0], line[k + 1], rel_tol=_TOLERANCE):
            return False
    return True
