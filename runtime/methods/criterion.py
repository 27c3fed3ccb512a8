"""What a criterion is: it sees every step and says which rows need the next model call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Course:
    """What is known of a trajectory when it begins.

    Attributes:
        rows: Rows that are decided on; 0 until they are known.
        steps: Steps planned, None where the host has not said.
        log_snr: ``[steps]`` ``lambda = ln(alpha / sigma)`` at each model call, increasing; infinite
            at a pure end of the schedule. None where it is not known.
        prediction: What the model predicts, a name of `sidestep.runtime.predictions`; None where
            it is not known.
        multistep: Whether the solver itself extrapolates from the outputs of earlier steps.
        noise: Whether the solver adds noise on the way, as far as its name and settings say.
    """

    rows: int = 0
    steps: int | None = None
    log_snr: Sequence[float] | None = None
    prediction: str | None = None
    multistep: bool = False
    noise: bool = False

    @property
    def advances(self) -> bool:
        """Whether lambda is known, and rises at every step: no step has a second stage."""
        return self.log_snr is not None and all(a < b for a, b in pairwise(self.log_snr))

    def after(self, steps: int) -> Course:
        """What is left of it after so many steps, of rows that are not known yet."""
        left = None if self.steps is None else max(self.steps - steps, 0)
        known = None if self.log_snr is None else self.log_snr[steps:]
        return replace(self, rows=0, steps=left, log_snr=known)


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """One step that was just taken, of all rows.

    Attributes:
        step: Its index, counted from 0 by steps and not by timesteps.
        x: ``[rows, ...]``, the latents before it.
        x_next: ``[rows, ...]``, the latents after it.
        output: ``[rows, ...]``, what the solver stepped with: the model's output, guidance
            combined; fresh for the rows that computed, reused for the others. None where the host
            hides it.
        computed: ``[rows]``, whether the model was really called for the row.
        step_sizes: ``[rows]`` fp32 ``mean |x_next - x|`` where a kernel has formed them already.
    """

    step: int
    x: Tensor
    x_next: Tensor
    output: Tensor | None
    computed: Sequence[bool]
    step_sizes: Tensor | None = None

    @cached_property
    def delta(self) -> Tensor:
        """``mean |x_next - x|`` of each row, ``[rows]`` fp32."""
        if self.step_sizes is not None:
            return self.step_sizes.clone()  # a kernel's own buffer
        return (self.x_next.float() - self.x.float()).abs().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What one step needs, row by row.

    A row that does not compute goes on with ``offset + sum_i weights[i] * (its i-th last computed
    output)``, formed in fp32, branch by branch.

    Attributes:
        compute: ``[rows]``, True where the model must be called.
        reasons: ``[rows]``, why, in a word or two: "warm-up", "criterion", "cap",
            "last", "output hidden", "skipped".
        value: ``[rows]`` fp32, the number that was compared with the threshold, left on its device
            until somebody asks for the summary; None where nothing was compared.
        weights: ``[rows]`` weights of the row's computed outputs, newest first, at most
            ``Criterion.history`` of them; None, or an empty row, holds the newest.
        offset: ``[rows, ...]``, shaped like the latents, added to every branch; None for nothing.
    """

    compute: list[bool]
    reasons: list[str]
    value: Tensor | None = None
    weights: Sequence[Sequence[float]] | None = None
    offset: Tensor | None = None


class Criterion(Protocol):
    """The decisions of one method. A row's decisions depend on that row alone.

    Attributes:
        history: Computed outputs that are kept for each row, 1 to hold the newest only.
    """

    history: int

    def start(self, course: Course) -> None:
        """Forgets everything: a trajectory begins, and its first step is computed."""

    def observe(self, seen: Observation) -> Decision:
        """Sees that a step is done and decides the one after it."""


@runtime_checkable
class Method(Protocol):
    """Settings of a method that makes fewer model calls: a frozen dataclass."""

    def criterion(self) -> Criterion:
        """A fresh decision state."""
