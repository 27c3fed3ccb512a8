"""What SRDS would gain on a device, from how long a model call of each size takes there.

With t(b) the seconds of a call with b evaluations (a guidance pair is one), c_k the evaluations
that the schedule has ready in tick k (`csrc/core/parareal_simulation.cpp`), n images and P ranks,

    serial = N t(n)
    SRDS   = N t_record + sum over ticks k of [ t(ceil(c_k / P) n) + t_tick + t_message ]

and the speed-up is their quotient.  Counted are also the evaluations that run ahead into iterations
which turn out not to be needed: at the end of iteration K those of K + 1 and K + 2 have long begun,
and a device that is busy pays for them.  With t(b) = t(1) (a + (1 - a) b) and nothing beside the
model, one rank has S = N / (a T + (1 - a) E), for T ticks and E evaluations.

Everything here is arithmetic; `sidestep.planning` measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidestep.kernels.core import simulate_parareal
from sidestep.runtime.latency import Latency, Overhead
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.methods.srds_blocks import block_counts, expected_iterations

WORTHWHILE = 1.05
"""Speed-up below which nothing but the plain loop is recommended."""

WORTHWHILE_ON_RANKS = 1.15
"""The same on several ranks, where what passes between them is assumed, and they wait for each
other: on two processes of one machine a fifth less was measured than was foretold."""

_AHEAD = 2  # iterations that run ahead, about


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run, and what it would give.

    Attributes:
        kind: ``"serial"``, ``"srds"``, or for several ranks ``"guidance"`` (each has a branch) or
            ``"images"`` (each has images of its own).
        steps: N.
        ranks: P.
        blocks: B, 0 but for SRDS.
        width: Most evaluations of an image in a tick; None for all that are ready.
        iterations: K_hat that an image is expected to need; what follows is the mean of the whole
            numbers beside it.
        ticks: Model calls in a row.
        evaluations: Of one image, on all ranks.
        seconds: Wall-clock.
        speedup: Against the plain loop.
        reason: What it costs and where it comes from, in words.
    """

    kind: str
    steps: int
    ranks: int
    blocks: int = 0
    width: int | None = None
    iterations: float = 0.0
    ticks: float
    evaluations: float
    seconds: float
    speedup: float
    reason: str = ""

    @property
    def length(self) -> float:
        """m: steps of a block, on average."""
        return self.steps / max(1, self.blocks)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run takes.

    Attributes:
        ticks: Model calls in a row.
        evaluations: Of one image, the mean of all images.
        seconds: Wall-clock.
    """

    ticks: float
    evaluations: float
    seconds: float


def predict(
    latency: Latency,
    bounds: Sequence[int],  # [B + 1]
    iterations: Sequence[int],  # [n]
    *,
    ranks: int = 1,
    width: int | None = None,
    overhead: Overhead | None = None,
    most: int | None = None,
) -> Cost:
    """What SRDS takes.

    Args:
        latency: Of the model.
        bounds: Of the blocks.
        iterations: K of each image; all of them run together, and an image that is done leaves.
        ranks: P that share the evaluations of every tick.
        width: Most evaluations of an image in a tick.
        overhead: Beside the model.
        most: ``max_iterations`` of the settings: none after these is begun.

    Raises:
        ValueError: An image has fewer than no or more iterations than there are blocks.
    """
    beside = overhead or Overhead()
    fronts = [wavefront(tuple(bounds), K, width, most) for K in iterations]
    calls = np.zeros(max(ticks for _, ticks in fronts))
    for widths, ticks in fronts:
        calls[:ticks] += np.ceil(widths / ranks)
    seconds = latency(calls) + beside.tick + beside.evaluation * calls
    if ranks > 1:
        seconds = seconds + beside.message
    return Cost(
        ticks=len(calls),
        evaluations=float(np.mean([widths.sum() for widths, _ in fronts])),
        seconds=float(seconds.sum()) + beside.record * bounds[-1],
    )


@lru_cache(maxsize=256)
def wavefront(
    bounds: tuple[int, ...],
    iterations: int,
    width: int | None = None,
    most: int | None = None,
) -> tuple[NDArray[np.int64], int]:
    """Evaluations in each tick until the last block has its end in iterate K, and those ticks.

    With those of two iterations more: in later ones most blocks' starts do not move
    (`sidestep.runtime.methods.srds`). On the bundled model, K from 1 to 6, there were 8 % fewer to
    7 % more than that. With a limited width the engine goes by who came first and the simulation
    by what is most urgent, which is a little faster. After ``most`` iterations none is begun.

    Returns:
        ``[T]`` evaluations, and T.

    Raises:
        ValueError: There are fewer than no or more iterations than blocks.
    """
    ahead = min(len(bounds) - 1, iterations + _AHEAD)
    if most is not None:
        ahead = max(iterations, min(ahead, most))
    front = simulate_parareal(bounds, ahead, width or 0)
    last = int(front.formed[iterations])
    return front.widths[:last], last


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do.

    Attributes:
        choice: The best candidate; the plain loop unless another gains 5 %, or 15 % on ranks.
        reason: Why, in a sentence.
        candidates: All of them, the fastest first.
    """

    choice: Candidate
    reason: str
    candidates: tuple[Candidate, ...]


def plan(
    latency: Latency,
    steps: int,
    *,
    images: int = 1,
    ranks: int = 1,
    branches: int = 1,
    iterations: float | None = None,
    widths: Sequence[int | None] = (None,),
    overhead: Overhead | None = None,
    alone: Latency | None = None,
) -> Decision:
    """Predicts every way to run so many steps, and picks one.

    Args:
        latency: Of the model on one rank; all are alike.
        steps: N.
        images: n that are made together.
        ranks: P, devices or processes.
        branches: Guidance branches of an evaluation.
        iterations: K that an image is expected to need; None for `expected_iterations`.
        widths: Limits of the evaluations of an image in a tick to try; None is no limit.
        overhead: Beside the model.
        alone: Of the model on a rank while the others rest, where they share a machine; None where
            nothing is shared. The plain loop has that.

    Raises:
        ValueError: A number is not 1 or more.
    """
    for name, value in {"steps": steps, "images": images, "ranks": ranks}.items():
        if value < 1:
            raise ValueError(f"plan: {name} is {value}, expected 1 or more")
    beside = overhead or Overhead()
    serial = steps * float((alone or latency)(images))
    found = _plain(latency, serial, steps, images, ranks, branches, beside)
    for blocks in block_counts(steps):
        K = min(float(blocks), iterations or expected_iterations(blocks))
        bounds = SRDS(blocks=blocks).bounds(steps)
        for width in widths:
            cost = _expected(latency, bounds, K, images, ranks, width, beside)
            if cost.ticks >= steps:  # no gain on any device
                continue
            found.append(
                Candidate(
                    kind="srds", steps=steps, ranks=ranks, blocks=blocks, width=width,
                    iterations=K, ticks=cost.ticks, evaluations=cost.evaluations,
                    seconds=cost.seconds, speedup=serial / cost.seconds,
                    reason=f"{cost.ticks:.0f} calls in a row instead of {steps}, with "
                    f"{cost.evaluations:.0f} evaluations instead of {steps}",
                )
            )  # fmt: skip
    found.sort(key=lambda one: (-round(one.speedup, 9), one.evaluations))
    choice = found[0]
    if choice.speedup < (WORTHWHILE if ranks == 1 else WORTHWHILE_ON_RANKS):
        choice = next(one for one in found if one.kind == "serial")
    if choice.kind == "serial":
        reason = _why_serial(latency, found, images)
    else:
        reason = choice.reason + _beside(choice, found)
    return Decision(choice=choice, reason=reason, candidates=tuple(found))


def choose(latency: Latency, steps: int, *, tolerance: float = 0.05, **facts: Any) -> SRDS | None:
    """The settings of SRDS where it gains something, and None where the plain loop is best.

    Args:
        latency: Of the model.
        steps: N.
        tolerance: Of the settings.
        facts: As for `plan`.

    Raises:
        ValueError: A number is out of range.
    """
    return settings_of(plan(latency, steps, **facts).choice, tolerance)


def settings_of(candidate: Candidate, tolerance: float = 0.05) -> SRDS | None:
    """The settings of SRDS that a candidate stands for; None for any other kind."""
    if candidate.kind != "srds":
        return None
    return SRDS(blocks=candidate.blocks, width=candidate.width, tolerance=tolerance)


def _expected(
    latency: Latency,
    bounds: Sequence[int],
    K: float,
    images: int,
    ranks: int,
    width: int | None,
    overhead: Overhead,
) -> Cost:
    """The mean of both whole numbers of iterations beside K."""
    low, high = math.floor(K), math.ceil(K)
    less, more = (
        predict(latency, bounds, [k] * images, ranks=ranks, width=width, overhead=overhead)
        for k in (low, high)
    )
    part = K - low
    return Cost(
        ticks=(1 - part) * less.ticks + part * more.ticks,
        evaluations=(1 - part) * less.evaluations + part * more.evaluations,
        seconds=(1 - part) * less.seconds + part * more.seconds,
    )


def _plain(
    latency: Latency,
    serial: float,
    steps: int,
    images: int,
    ranks: int,
    branches: int,
    beside: Overhead,
) -> list[Candidate]:
    """The ways without iterations, whose result is that of the plain loop."""
    ways = [("serial", serial, "one call after the other")]
    if ranks > 1 and branches > 1:
        share = math.ceil(branches / min(ranks, branches)) / branches
        engine = beside.record + beside.tick + beside.evaluation * images
        seconds = steps * (float(latency(images * share)) + beside.message + engine)
        ways.append(("guidance", seconds, "the guidance branches on ranks of their own, exact"))
    if ranks > 1 and images > 1:
        seconds = steps * float(latency(math.ceil(images / ranks)))
        ways.append(("images", seconds, "every rank makes images of its own, exact"))
    return [
        Candidate(
            kind=kind, steps=steps, ranks=ranks, ticks=steps, evaluations=steps, seconds=seconds,
            speedup=serial / seconds, reason=reason,
        )
        for kind, seconds, reason in ways
    ]  # fmt: skip


def _beside(choice: Candidate, found: Sequence[Candidate]) -> str:
    """What SRDS would have given instead; empty where it was chosen, or has nothing to run."""
    best = next((one for one in found if one.kind == "srds"), None)
    if best is None or choice.kind == "srds":
        return ""
    return f"; SRDS would run at {best.speedup:.2f} of the serial speed"


def _why_serial(latency: Latency, found: Sequence[Candidate], images: int) -> str:
    others = [one for one in found if one.kind == "srds"]
    if not others:
        return (
            "there are too few steps, or the width is too small: no number of blocks makes fewer "
            "calls in a row"
        )
    best = others[0]
    together = max(2, round(best.evaluations / best.ticks / best.ranks))
    ratio = float(latency(together * images) / latency(images))
    costs = (
        f"a call with {together * images} evaluations takes {ratio:.1f} times as long as one with "
        f"{images}"
    )
    if ratio > 0.9 * together:
        return f"{costs}: nothing is gained by making calls together"
    return (
        f"{costs}, and {best.blocks} blocks need {best.evaluations:.0f} evaluations instead of "
        f"{best.steps}, in {best.ticks:.0f} calls: {best.speedup:.2f} of the serial speed"
    )
