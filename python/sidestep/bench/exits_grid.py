"""What ``sidestep bench exits`` compares: every family with its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sidestep.runtime.exits.file import Exits, load_exits
from sidestep.runtime.exits.layouts import Layout
from sidestep.runtime.exits.leaving import Leaving, Rule, Sight
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criterion import Course, Method
from sidestep.runtime.methods.early_exit import EarlyExit

EXCESS: dict[str, tuple[str, Adaptive | bool | None]] = {
    "static": ("static", None),
    "static-exits": ("static", False),
    "sample": ("sample", None),
    "sample+adaptive": ("sample", Adaptive(mode="error-control")),
}
"""`EarlyExit`: mode and reuse."""

FAMILIES = (
    *EXCESS, "fixed-exit", "fewer-steps", "adaptive", "first-block-cache", "oracle", "adadiff",
)  # fmt: skip

OVERHEAD = "overhead"
"""`EarlyExit` at a threshold of 0, by mode: measured where it is asked for by name."""

BUDGETS = (0.025, 0.05, 0.1, 0.2, 0.4)
ADAPTIVE_FACTORS = (0.25, 0.35, 0.5, 1.0, 2.0)
CACHE_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)
UNCERTAINTIES = (0.08, 0.12, 0.16, 0.2, 0.24)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One point of the comparison.

    Attributes:
        family: A name of `FAMILIES`, `OVERHEAD`, or ``"full"``.
        label: The setting.
        threshold: The number that it is set by; None where there is none.
        method: What `sidestep.enable` is given; None for the plain loop.
        steps: Steps of the sampler, where not all of them.
    """

    family: str
    label: str
    threshold: float | None = None
    method: Method | None = None
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Planned(EarlyExit):
    """Exits by a table that was made beforehand.

    Attributes:
        plan: ``[rows][steps]`` exit of each row at each step, K where it does not leave; one line
            stands for all rows. In the first step all rows are at the same exit.
    """

    plan: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.plan or len({(len(row), row[0]) for row in self.plan}) > 1:
            raise ValueError("Planned: expected rows of equal length that begin at the same exit")

    def leaving(self, exits: Exits, layout: Layout) -> Leaving:
        """Of a rule that looks into the table."""
        return Leaving(exits, layout, Told(self.plan))


class Told(Rule):
    """Rows leave where the table says."""

    def __init__(self, plan: Sequence[Sequence[int]]) -> None:
        """Takes the table."""
        self._plan = plan

    def start(self, course: Course) -> None:
        """Nothing is to be known."""

    def resume(self, course: Course, steps: int) -> None:
        """The table goes on, whoever the rows are."""
        self._plan = [row[steps:] for row in self._plan]

    def leave(self, sight: Sight) -> Sequence[bool] | None:
        """By the table; before rows are known, by what is the same for all."""
        if sight.step >= len(self._plan[0]):
            return None
        rows = [0] * len(sight.hidden) if sight.rows is None else sight.rows
        return [self._plan[row % len(self._plan)][sight.step] == sight.exit for row in rows]


def policies(
    family: str, steps: int, exits: Path, thresholds: Sequence[float], faithful: Path | None
) -> list[Policy]:
    """The settings of a family that are known before anything is measured.

    Args:
        family: All but ``"fewer-steps"`` and ``"oracle"``.
        steps: Of the sampler.
        exits: The exits file.
        thresholds: Budgets of those that have one.
        faithful: AdaDiff's exits file.
    """
    if family in EXCESS:
        mode, reuse = EXCESS[family]
        return [
            _set(family, t, EarlyExit(exits=exits, mode=mode, threshold=t, reuse=reuse))
            for t in thresholds
        ]
    if family == OVERHEAD:
        none = [EarlyExit(exits=exits, mode=mode, threshold=0) for mode in ("static", "sample")]
        return [Policy(family=family, label=str(m.mode), threshold=0, method=m) for m in none]
    if family == "fixed-exit":
        return [
            Policy(
                family=family,
                label=f"block {blocks}",
                method=Planned(exits=exits, plan=((exit,) * steps,)),
            )
            for exit, blocks in enumerate(load_exits(exits).after)
        ]
    if family == "adaptive":
        own = Adaptive().threshold
        assert own is not None
        found = [float(f"{factor * own:.3g}") for factor in ADAPTIVE_FACTORS]
        return [_set(family, t, Adaptive(threshold=t)) for t in found]
    if family == "first-block-cache":
        return [_set(family, t, None) for t in CACHE_THRESHOLDS]
    if faithful is None:
        return []
    return [_set(family, t, EarlyExit(exits=faithful, threshold=t)) for t in UNCERTAINTIES]


def fewer_steps(shares: Sequence[float], steps: int) -> list[Policy]:
    """The plain loop with fewer steps, at the cost of what runs these shares of all blocks."""
    counts = sorted({equal_cost(share, steps) for share in shares} - {steps}, reverse=True)
    return [Policy(family="fewer-steps", label=f"{n} steps", steps=n) for n in counts]


def equal_cost(share: float, steps: int) -> int:
    """Whole steps that cost as much as all steps at this share of the blocks."""
    return min(steps, max(1, round(share * steps)))


def _set(family: str, threshold: float, method: Method | None) -> Policy:
    return Policy(family=family, label=f"{threshold:g}", threshold=threshold, method=method)
