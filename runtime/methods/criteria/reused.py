"""What the reuse rule puts in for an output, and how far that comes true when one is computed.

With a row's newest computed output u_0, the output u of the step that it computes next, and the
change p since u_0 that the reuse rule has for that step,

    moved = u - u_0,    missed = moved - d p,    share = <moved, p> / <p, p>  within 0 and 1

where d is 1, or for the rule "damped" the greater of the share before and of `straightness`: that
much of the line came true the last time, or can be relied on whatever came true.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.runtime.methods.criteria.outputs import (
    ComputedOutputs,
    broadcast,
    per_row,
    row_sum,
)
from sidestep.runtime.methods.criterion import Course, Observation
from sidestep.runtime.methods.reuse import HISTORY, reuse_weights, straightness

_UNKNOWN_SHARE = 0.5  # of the line's change that comes true, before any was measured


class Reused:
    """The computed outputs that a rule looks at, with what is measured when a new one comes.

    Attributes:
        kept: The outputs, of `HISTORY` as many as the rule looks at.
        steps: ``[rows]``, the steps of each row's computed outputs, newest first.
        size: ``[rows]`` fp32, rms of the newest; empty before the first.
        moved: ``[rows]`` fp32, rms of its change; not a number before the second.
        missed: ``[rows]`` fp32, rms of what the rule missed of it, likewise.
        share: ``[rows]`` fp32, the part of the rule's change that came true.
    """

    def __init__(self, course: Course, rule: str) -> None:
        """A trajectory begins.

        Args:
            course: Its rows and, where known, their lambda.
            rule: A name in `HISTORY`.
        """
        self.course = course
        self.rule = rule
        self.kept = ComputedOutputs(course.rows, HISTORY[rule])
        self.steps = self.kept.steps
        self.size = self.moved = self.missed = self.share = torch.empty(0)

    def put(self, seen: Observation) -> None:
        """Takes in a step: the rows that computed it, the others stay as they are."""
        if not any(seen.computed):
            return
        assert seen.output is not None
        output = seen.output.float()
        fresh = per_row(seen.computed, output)
        size = rms(output)
        if not self.kept.outputs:
            self.size, self.share = size, torch.full_like(size, _UNKNOWN_SHARE)
            self.moved = self.missed = torch.full_like(size, math.nan)
        else:
            moved = output - self.kept.outputs[0]
            foretold = self.kept.combine(self._changes(seen.step))
            missed = moved - broadcast(self._dampings(seen.step), moved) * foretold
            self.size = torch.where(fresh, size, self.size)
            self.moved = torch.where(fresh, rms(moved), self.moved)
            self.missed = torch.where(fresh, rms(missed), self.missed)
            self.share = torch.where(fresh, _share(moved, foretold), self.share)
        self.kept.put(output, seen)

    def damping(self, row: int, wanted: int, share: float) -> float:
        """What a row's slope is multiplied by at step ``wanted``, given its share."""
        if self.rule != "damped":
            return 1.0
        return max(share, straightness(self.steps[row], wanted, self.course))

    def foretell(self, wanted: int) -> Tensor:  # [rows, ...] fp32
        """What the rule puts in the place of the output at step ``wanted``; reads the device."""
        snr, shares = self.course.log_snr, self.share.tolist()
        weights = [
            reuse_weights(self.rule, steps, wanted, snr, self.damping(row, wanted, shares[row]))
            for row, steps in enumerate(self.steps)
        ]
        return self.kept.combine(weights)

    def _changes(self, step: int) -> list[tuple[float, ...]]:
        """Weights of the change since the newest output that the rule has for ``step``."""
        rows = [reuse_weights(self.rule, s, step, self.course.log_snr) for s in self.steps]
        return [(row[0] - 1, *row[1:]) for row in rows]

    def _dampings(self, step: int) -> Tensor:  # [rows]
        """`damping` of all rows, without a read."""
        if self.rule != "damped":
            return torch.ones_like(self.share)
        least = [straightness(steps, step, self.course) for steps in self.steps]
        return torch.maximum(self.share, per_row(least, self.share))


def gaps(steps: Sequence[Sequence[int]]) -> list[int]:
    """Steps between the two newest of each row, 1 where there is one only."""
    return [row[0] - row[1] if len(row) > 1 else 1 for row in steps]


def rms(x: Tensor) -> Tensor:  # [rows, ...] -> [rows]
    """Root of the mean square over each row."""
    return (row_sum(x.square()) / x[0].numel()).sqrt()


def _share(
    moved: Tensor,  # [rows, ...]
    foretold: Tensor,  # [rows, ...]
) -> Tensor:  # [rows]
    """The part of a foretold change that came true, by least squares, within 0 and 1."""
    product, square = row_sum(moved * foretold), row_sum(foretold.square())
    return torch.where(square > 0, (product / square).clamp(0, 1), _UNKNOWN_SHARE)
