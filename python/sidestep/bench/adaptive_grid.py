"""What ``sidestep bench adaptive`` compares: every family of policies with its settings."""

from __future__ import annotations

from dataclasses import dataclass

from sidestep.bench.adaptive_policies import Sada, Uniform, Zeus
from sidestep.runtime.methods.adaptive import DEFAULT_MODE, Adaptive
from sidestep.runtime.methods.criteria import CRITERIA
from sidestep.runtime.methods.criterion import Method

SWEEPS = {
    "default": (0.38, 0.5, 0.6, 0.8, 1.0, 1.3, 1.8, 2.6, 6.0),
    "error-control": (0.5, 1.0, 1.5, 2.2),
    "paper": (1.0, 3.0),
}
LONG_SWEEPS = {"default": (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)}
OTHER_SWEEP = (1.0, 2.5)
"""What a mode's own threshold is multiplied by in its sweep; from `LONG` steps on, and others."""

LONG = 100

RIVALS = ("paper", "error-control")
"""Modes that are measured on all prompts: the published one, and the best without training."""

PATTERNS = ("uniform-hold", "uniform-linear", "zeus", "sada")
OTHERS = ("fewer-steps", "deepcache", "oracle")

ZEUS_SETTINGS = (
    (3, 0.2, 0.9, True),
    (3, 0.1, 0.96, False),
    (4, 0.1, 0.96, False),
)
"""every, begin, end, late. The published range, and one that leaves fewer steps out: within the
published one ZEUS does not come below 20 calls of 50."""

SADA_SETTINGS = (
    (2, 0.2, 0.94, False),
    (4, 0.2, 0.94, True),
    (4, 0.1, 0.96, False),
)
"""max_interval, begin, end, late."""

FEWER_SHARES = (0.6, 0.4)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One point of the comparison.

    Attributes:
        family: What it is a setting of; a name of `families`.
        label: The setting.
        method: What `sidestep.enable` is given; None for the plain loop.
        steps: Steps of the sampler, where not all of them.
        interval: DeepCache: one full call in so many steps.
        calls: Oracle: calls of every image.
    """

    family: str
    label: str
    method: Method | None = None
    steps: int | None = None
    interval: int | None = None
    calls: int | None = None


def families() -> tuple[str, ...]:
    """All families: the default mode, the other modes of `Adaptive`, the baselines."""
    modes = tuple(mode for mode in CRITERIA if mode == "paper" or mode != DEFAULT_MODE)
    return ("default", *modes, *PATTERNS, *OTHERS)


def on_subset(family: str) -> bool:
    """Whether a family is measured on the first prompts only: what decides nothing, or is dear."""
    return family == "oracle" or (family in CRITERIA and family not in RIVALS)


def policies(family: str, steps: int, exploding: bool) -> list[Policy]:
    """The settings of one family that are compared.

    Args:
        steps: Steps of the sampler.
        exploding: Whether the scheduler's latents are those of Euler.
    """
    if family == "default" or family in CRITERIA:
        return _thresholds(family, steps)
    if family.startswith("uniform"):
        return _uniform(family, steps)
    if family == "zeus":
        return [
            _pattern(family, Zeus(every=m, begin=begin, end=end, late=late, exploding=exploding))
            for m, begin, end, late in ZEUS_SETTINGS
        ]
    if family == "sada":
        return [
            _pattern(
                family,
                Sada(max_interval=m, begin=begin, end=end, late=late, exploding=exploding),
            )
            for m, begin, end, late in SADA_SETTINGS
        ]
    if family == "fewer-steps":
        shares = FEWER_SHARES if steps < LONG else (0.2, 0.13, 0.08)
        counts = sorted({round(steps * share) for share in shares}, reverse=True)
        return [Policy(family=family, label=f"{n} steps", steps=n) for n in counts]
    if family == "deepcache":
        return [Policy(family=family, label=f"interval {n}", interval=n) for n in (2, 3, 5)]
    return [Policy(family=family, label=f"{n} calls", calls=n) for n in oracle_calls(steps)]


def _uniform(family: str, steps: int) -> list[Policy]:
    """One in so many, as it is and with the last steps computed, where a line errs most."""
    reuse = family.removeprefix("uniform-")
    every = (2, 3, 4) if steps < LONG else (5, 10, 15)
    return [
        Policy(
            family=family,
            label=f"1 in {m}" + (f", last {last}" if last else ""),
            method=Uniform(every=m, reuse=reuse, last=last),
        )
        for last in ((0, 3) if reuse == "linear" else (0,))
        for m in (every if last else every[:2])
    ]


def oracle_calls(steps: int) -> list[int]:
    """Numbers of calls at which the oracle is searched."""
    shares = (0.6,) if steps < 40 else (0.4,) if steps < 100 else (0.1,)
    return [round(share * steps) for share in shares]


def _thresholds(family: str, steps: int) -> list[Policy]:
    """The sweep of a mode's threshold around its own one."""
    mode = DEFAULT_MODE if family == "default" else family
    factors = SWEEPS.get(family, OTHER_SWEEP)
    if steps >= LONG:
        factors = LONG_SWEEPS.get(family, factors)
    own = CRITERIA[mode].DEFAULTS.threshold
    return [
        Policy(
            family=family,
            label=f"threshold {own * factor:g}",
            method=Adaptive(mode=mode, threshold=own * factor),
        )
        for factor in factors
    ]


def _pattern(family: str, settings: Zeus | Sada) -> Policy:
    rate = f"1 in {settings.every}" if isinstance(settings, Zeus) else f"≤ {settings.max_interval}"
    late = ", late x0" if settings.late else ""
    label = f"{rate}, {settings.begin:.0%}-{settings.end:.0%}{late}"
    return Policy(family=family, label=label, method=settings)
