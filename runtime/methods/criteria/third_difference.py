"""The published criterion: the third-order difference of the latents, on scalar step sizes.

Ye et al., "Training-Free Adaptive Diffusion with Bounded Difference Approximation Strategy",
NeurIPS 2024 (arXiv 2410.09873).  With the latents x_0 (noise), x_1, x_2, ... and the step sizes

    delta_k = mean |x_{k+1} - x_k|

the last prediction is reused at step k + 1 if

    xi_k <= threshold * delta_{k-1},        xi_k = |(delta_k + delta_{k-2}) / 2 - delta_{k-1}|

xi is half the second difference of the step sizes.  The published program takes the mean over the
whole batch; here every row has its own.
"""

from __future__ import annotations

from torch import Tensor

from sidestep.runtime.methods.criteria.gate import Gate, Gated
from sidestep.runtime.methods.criterion import Course, Decision, Observation


class StepSizes:
    """The last three step sizes, and the third difference formed of them."""

    def __init__(self) -> None:
        self._deltas: list[Tensor] = []  # [rows] fp32 each, oldest first

    def put(self, delta: Tensor) -> tuple[Tensor, Tensor] | None:
        """Takes in ``delta_k``, ``[rows]``.

        Returns:
            ``xi_k`` and ``delta_{k-1}``, ``[rows]`` each; None before the third step size.
        """
        self._deltas = [*self._deltas[-2:], delta]
        if len(self._deltas) < 3:
            return None
        before, previous, current = self._deltas
        return ((current + before) / 2 - previous).abs(), previous


class ThirdDifference(Gated):
    """The published formula under the shared gate: v = xi_k / delta_{k-1}, the cap exact."""

    DEFAULTS = Gate(threshold=0.03)

    def begin(self) -> None:
        """Forgets the step sizes."""
        self._sizes = StepSizes()

    def measure(self, seen: Observation) -> Tensor | None:
        """``xi_k / delta_{k-1}``."""
        pair = self._sizes.put(seen.delta)
        return None if pair is None else pair[0] / pair[1]


class Published:
    """The published program to the bit, one decision per row.

    Its cap is looked at only when more than four decisions were made (``len(mask) > 4``), so that
    the first run of skips can be 5 long whatever ``max_skip`` says; its last steps may be skipped.
    """

    DEFAULTS = Gate(
        threshold=0.01, max_skip=4, reuse="hold", warm_up=4, protect_last=0, debt=False
    )  # fmt: skip
    _UNCAPPED = 4  # decisions
    history = 1

    def __init__(self, gate: Gate) -> None:
        """Makes the state; `start` comes before the first observation.

        Raises:
            ValueError: A setting was asked for that the published program does not have.
        """
        for name in ("reuse", "warm_up", "protect_last", "debt", "gradual"):
            given, own = getattr(gate, name), getattr(self.DEFAULTS, name)
            if given != own:
                raise ValueError(
                    f"Adaptive: mode 'paper' is the published program, with {name}={own!r} only, "
                    f"got {given!r}; mode 'third-difference' is its formula with every setting"
                )
        self.threshold = gate.threshold
        self.max_skip = gate.max_skip
        self.start(Course(rows=0))

    def start(self, course: Course) -> None:
        """Forgets everything: a trajectory begins."""
        self._sizes = StepSizes()
        self._decided = 0
        self._skips = [0] * course.rows  # length of the current run of skips

    def observe(self, seen: Observation) -> Decision:
        """Decides step ``seen.step + 1`` from the step sizes up to ``seen.step``."""
        rows = len(self._skips)
        pair = self._sizes.put(seen.delta)
        if pair is None or seen.step + 1 < self.DEFAULTS.warm_up:
            return Decision(compute=[True] * rows, reasons=["warm-up"] * rows)
        xi, previous = pair
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
        if self._decided > self._UNCAPPED and self._skips[row] >= run:
            reason = "cap"
        else:
            reason = "skipped" if stable else "criterion"
        self._skips[row] = self._skips[row] + 1 if reason == "skipped" else 0
        return reason
