"""What all criteria share: warm-up, cap, protected last steps, skip debt, and the reuse rule.

A criterion's own file gives one number v >= 0 a step and row, the harm that reusing would do.
After step k, step k + 1 is skipped if

    d + v <= threshold        and 0 < threshold

where d, the debt, is the sum of the v of the present run of skips: inside a run v goes blind, as
the latents follow outputs that were not computed.  A v that is not a number computes.  Gradual, a
run of skips is at most one step longer than the run before it (one for every hundred steps of the
trajectory): a first v that happens to be small must not decide a long stretch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sidestep.runtime.methods.criteria.outputs import row_sum
from sidestep.runtime.methods.criteria.reused import Reused
from sidestep.runtime.methods.criterion import Course, Decision, Observation
from sidestep.runtime.methods.reuse import HISTORY, reuse_weights


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The settings of a criterion; `Adaptive` documents them.

    Raises:
        ValueError: A setting is out of range.
    """

    threshold: float
    max_skip: int = 4
    reuse: str = "linear"
    warm_up: int = 4
    protect_last: int = 1
    debt: bool = True
    gradual: bool = False
    predictor: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"Adaptive: threshold is {self.threshold}, expected 0 or more")
        for name, least in (("max_skip", 1), ("warm_up", 1), ("protect_last", 0)):
            value = getattr(self, name)
            if value != int(value) or value < least:
                raise ValueError(f"Adaptive: {name} is {value}, expected a whole number >= {least}")
        if self.reuse not in HISTORY:
            known = ", ".join(map(repr, HISTORY))
            raise ValueError(f"Adaptive: reuse is {self.reuse!r}, expected one of: {known}")


class Gated(ABC):
    """A `Criterion` whose subclass gives only `measure`."""

    DEFAULTS: ClassVar[Gate]
    reads_output: ClassVar[bool] = False
    """Whether `measure` needs ``seen.output``: without it every step is computed."""
    reads_reused: ClassVar[bool] = False
    """Whether `measure` needs `Reused`, and so the output as well."""

    def __init__(self, gate: Gate) -> None:
        """Makes the state; `start` comes before the first observation."""
        self.gate = gate
        self.history = HISTORY[gate.reuse]
        self._compares = self.reads_reused or gate.reuse == "damped"  # outputs with the rule's
        self.course = Course(rows=0)

    def start(self, course: Course) -> None:
        """Forgets everything: a trajectory begins."""
        self.course = course
        self._computed: list[list[int]] = [[] for _ in range(course.rows)]  # steps, newest first
        self._debts = [0.0] * course.rows
        self.reused = Reused(course, self.gate.reuse)
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """The subclass forgets what it has seen."""

    @abstractmethod
    def measure(self, seen: Observation) -> Tensor | None:
        """The number v of the step after ``seen``, ``[rows]`` fp32 on the latents' device.

        None while too few steps were seen to form it. Called once a step, with the steps in order,
        so that it can keep what it needs of them.
        """

    def observe(self, seen: Observation) -> Decision:
        """Sees that a step is done and decides the one after it."""
        for row, computed in enumerate(seen.computed):
            if computed:
                self._computed[row] = [seen.step, *self._computed[row][:2]]
                self._debts[row] = 0.0
        hidden = seen.output is None and (self.reads_output or self._compares)
        value = None if hidden else self.number(seen)
        wanted = seen.step + 1
        if hidden:
            forced = ["output hidden"] * self.course.rows
        else:
            forced = [self._forced(wanted, row, value) for row in range(self.course.rows)]
        if value is None or all(forced):
            return Decision(compute=[True] * self.course.rows, reasons=forced)
        shares = [self.reused.share] if self.gate.reuse == "damped" else []
        total, *shares = torch.stack([value.float(), *shares]).cpu()  # the one read of this step
        if self.gate.debt:
            total = total + torch.tensor(self._debts, dtype=torch.float32, device="cpu")
        self._debts = total.tolist()
        limit = self.gate.threshold or -1.0  # 0 never skips, whatever v is
        reasons = [
            reason or ("skipped" if number <= limit else "criterion")
            for reason, number in zip(forced, self._debts, strict=True)
        ]
        return Decision(
            compute=[reason != "skipped" for reason in reasons],
            reasons=reasons,
            value=total,
            weights=self._weights(wanted, reasons, shares[0].tolist() if shares else None),
        )

    def number(self, seen: Observation) -> Tensor | None:
        """`measure`, with `reused` up to date where it is looked at."""
        if self._compares:
            self.reused.put(seen)
        return self.measure(seen)

    def _forced(self, wanted: int, row: int, value: Tensor | None) -> str:
        """Why step ``wanted`` is computed whatever the number says; empty if it is not."""
        gate, steps = self.gate, self.course.steps
        computed = self._computed[row]
        if wanted < gate.warm_up or value is None or not computed:
            return "warm-up"
        if steps is not None and wanted >= steps - gate.protect_last:
            return "last"
        longest = gate.max_skip
        if gate.gradual and len(computed) > 1:
            growth = max(1, (steps or 0) // 100)
            longest = min(longest, computed[0] - computed[1] - 1 + growth)
        return "cap" if wanted - computed[0] > longest else ""

    def _weights(
        self, wanted: int, reasons: Sequence[str], shares: Sequence[float] | None
    ) -> list[tuple[float, ...]] | None:
        if self.gate.reuse == "hold":
            return None
        weights: list[tuple[float, ...]] = []
        for row, reason in enumerate(reasons):
            steps = self._computed[row]
            damping = 1.0 if shares is None else self.reused.damping(row, wanted, shares[row])
            weights.append(
                reuse_weights(self.gate.reuse, steps, wanted, self.course.log_snr, damping)
                if reason == "skipped"
                else ()
            )
        return weights


def row_mean(x: Tensor) -> Tensor:  # [rows, ...] -> [rows]
    """Mean of ``|x|`` over each row."""
    return row_sum(x.abs()) / x[0].numel()
