"""What a criterion is: it sees every step and says which rows need the next model call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What one step needs, row by row.

    Attributes:
        compute: ``[rows]``, True where the model must be called.
        reasons: ``[rows]``, why, in a word or two: "warm-up", "criterion", "cap", "skipped".
        value: ``[rows]`` fp32, the number that was compared with the threshold, left on its device
            until somebody asks for the summary; None where nothing was compared.
    """

    compute: list[bool]
    reasons: list[str]
    value: Tensor | None = None


class Criterion(Protocol):
    """The decisions of one method. A row's decisions depend on that row alone."""

    def start(self, rows: int, steps: int | None = None) -> None:
        """Forgets everything: a trajectory begins, and its first step is computed.

        Args:
            rows: Rows that are decided on.
            steps: Steps planned, None where the host has not said.
        """

    def observe(self, step: int, delta: Tensor) -> Decision:
        """Sees that step ``step`` is done and decides step ``step + 1``.

        Args:
            step: Index of the step just taken, counted from 0 by calls and not by timesteps.
            delta: ``[rows]`` fp32, ``mean |x_{k+1} - x_k|`` of each row.
        """
