"""AdaptiveDiffusion: skip the model while the third-order difference of the latents is small.

Ye et al., "Training-Free Adaptive Diffusion with Bounded Difference Approximation Strategy",
NeurIPS 2024 (arXiv 2410.09873).  With the latents x_0 (noise), x_1, x_2, ... and the step sizes

    delta_k = mean |x_{k+1} - x_k|

the last prediction is reused at step k + 1 if

    xi_k <= threshold * delta_{k-1},        xi_k = |(delta_k + delta_{k-2}) / 2 - delta_{k-1}|

unless the row has skipped too often in a row.  The published program takes the mean over the whole
batch; here every row has its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sidestep.runtime.methods.criterion import Criterion, Decision

WARM_UP = 4
"""Steps 0 to 3 call the model: xi_3 is the first that can be formed without the initial noise."""

_UNCAPPED = 4
"""The published program looks at the cap only when more than this many decisions were made
(``len(mask) > 4``), so that the first run of skips can be 5 long whatever ``max_skip`` says."""

MODES = ("paper",)


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Settings of AdaptiveDiffusion.

    Published presets: 0.01 and 4 (Stable Diffusion, SDXL, I2VGen-XL, ModelScope), 0.004 and 6
    (latent diffusion), 0.008 and 4 (I2VGen-XL at 50 steps).

    Attributes:
        mode: ``"paper"``, the published estimator exactly, row by row.
        threshold: Largest ``xi / delta`` at which the last prediction is reused.
        max_skip: Most skips in a row, the first run excepted (it may be 5 long).

    Raises:
        ValueError: A setting is out of range, or the mode is unknown.
    """

    mode: str = "paper"
    threshold: float = 0.01
    max_skip: int = 4

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            known = ", ".join(repr(mode) for mode in MODES)
            raise ValueError(f"Adaptive: mode is {self.mode!r}, expected one of: {known}")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"Adaptive: threshold is {self.threshold}, expected 0 or more")
        if self.max_skip != int(self.max_skip) or self.max_skip < 1:
            raise ValueError(f"Adaptive: max_skip is {self.max_skip}, expected a whole number >= 1")

    def criterion(self) -> Criterion:
        """A fresh decision state."""
        return ThirdDifference(self.threshold, self.max_skip)


class ThirdDifference:
    """The published estimator, one decision per row."""

    def __init__(self, threshold: float, max_skip: int) -> None:
        self.threshold = threshold
        self.max_skip = max_skip
        self.start(0)

    def start(self, rows: int, steps: int | None = None) -> None:
        """Forgets everything: a trajectory of ``rows`` rows begins; ``steps`` plays no part."""
        self._deltas: list[Tensor] = []  # the last three, [rows] fp32 each
        self._decided = 0
        self._skips = [0] * rows  # length of the current run of skips

    def observe(self, step: int, delta: Tensor) -> Decision:
        """Decides step ``step + 1`` from the step sizes up to ``step``.

        Args:
            step: Index of the step just taken.
            delta: ``[rows]`` fp32.
        """
        rows = len(self._skips)
        self._deltas = [*self._deltas[-2:], delta]
        if step + 1 < WARM_UP:
            return Decision(compute=[True] * rows, reasons=["warm-up"] * rows)
        before, previous, current = self._deltas
        xi = ((current + before) / 2 - previous).abs()
        stable = (xi <= self.threshold * previous).tolist()  # the one read of this step
        reasons = [self._decide(row, stable[row]) for row in range(rows)]
        self._decided += 1
        return Decision(
            compute=[reason != "skipped" for reason in reasons],
            reasons=reasons,
            value=xi / previous,
        )

    def _decide(self, row: int, stable: bool) -> str:
        run = min(self.max_skip, self._decided)
        if self._decided > _UNCAPPED and self._skips[row] >= run:
            reason = "cap"
        else:
            reason = "skipped" if stable else "criterion"
        self._skips[row] = self._skips[row] + 1 if reason == "skipped" else 0
        return reason
