"""Baseline policies of ``sidestep bench adaptive``, as criteria of the decision protocol.

Each is the settings of a method for `sidestep.enable`. They know their pattern beforehand, except
`Sada`. What they reuse is a weighted sum of a row's last computed outputs, or, where a method works
on the data prediction ``x0 = (x - sigma eps) / alpha``, the output that belongs to an ``x0``:

    eps = (x - alpha x0) / sigma                                    (`Decision.offset`)

Time is counted in steps, as the published programs do, unless a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sidestep.runtime.methods.criterion import Course, Criterion, Decision, Observation
from sidestep.runtime.methods.reuse import HISTORY, extrapolation_weights, reuse_weights

WARM_UP = 5
"""Uniform patterns compute steps 0 to 4, then one step of every ``every``: 4 + every, ..."""


class Pattern:
    """The decisions of a pattern that is known beforehand."""

    def __init__(self, computes: Callable[[int, int, int], bool], reuse: str) -> None:
        """Makes the criterion.

        Args:
            computes: (row, step, steps planned) -> whether the model is called.
            reuse: A rule of `reuse_weights`.
        """
        self.computes = computes
        self.reuse = reuse
        self.history = HISTORY[reuse]

    def start(self, course: Course) -> None:
        """A trajectory begins."""
        if course.steps is None:
            raise ValueError("a pattern: the number of steps is unknown, expected the host's plan")
        self.course, self.steps = course, course.steps
        self.computed: list[list[int]] = [[] for _ in range(course.rows)]  # newest first

    def observe(self, seen: Observation) -> Decision:
        """Decides the step after ``seen``."""
        self.note(seen)
        k = seen.step + 1
        return self.decision(
            [self.computes(i, k, self.steps) for i in range(len(self.computed))], k
        )

    def note(self, seen: Observation) -> None:
        """Enters which rows were computed."""
        for steps, computed in zip(self.computed, seen.computed, strict=True):
            if computed:
                steps[:] = [seen.step, *steps][: self.history]

    def decision(self, compute: list[bool], k: int) -> Decision:
        """The protocol's object for step ``k``, with this pattern's weights."""
        return Decision(
            compute=compute,
            reasons=["pattern" if c else "skipped" for c in compute],
            weights=[
                reuse_weights(self.reuse, steps, k, self.course.log_snr) for steps in self.computed
            ],
        )


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """One step in ``every`` after a warm-up of 5, the same for all prompts.

    Attributes:
        every: Computed after the warm-up are steps 4 + every, 4 + 2 every, ...
        reuse: What a skipped step goes on with, a rule of `reuse_weights`.
        last: Last steps, computed as well.
    """

    every: int
    reuse: str = "hold"
    last: int = 0

    def criterion(self) -> Criterion:
        """A fresh decision state."""

        def computes(_row: int, k: int, steps: int) -> bool:
            return k < WARM_UP or (k - WARM_UP + 1) % self.every == 0 or k >= steps - self.last

        return Pattern(computes, self.reuse)


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Every row's own list of computed steps; the oracle's form.

    Attributes:
        computed: The computed steps of each row, as many rows as the pipeline's batch.
        reuse: A rule of `reuse_weights`.
    """

    computed: tuple[tuple[int, ...], ...]
    reuse: str = "linear"

    def criterion(self) -> Criterion:
        """A fresh decision state."""
        rows = [frozenset(steps) for steps in self.computed]
        return Pattern(lambda row, k, _n: k in rows[row], self.reuse)


class Levels:
    """alpha and sigma at every step: ``x = alpha x0 + sigma eps``."""

    def __init__(self, course: Course, exploding: bool) -> None:
        """Reads them off the course.

        Args:
            exploding: ``alpha = 1`` (diffusers' Euler), else ``alpha^2 + sigma^2 = 1``.
        """
        if course.log_snr is None:
            raise ValueError("a policy on x0: log_snr is unknown, expected it from the host")
        self.log_snr = np.asarray(course.log_snr, dtype=np.float64)
        alpha = np.ones_like(self.log_snr) if exploding else (1 + np.exp(-2 * self.log_snr)) ** -0.5
        self.alpha, self.sigma = alpha.tolist(), (alpha * np.exp(-self.log_snr)).tolist()

    def data(self, x: Tensor, output: Tensor | None, k: int) -> Tensor:
        """``x0`` at step ``k``, ``[rows, ...]``, from a prediction of the noise."""
        if output is None:
            raise ValueError("a policy on x0: the host hides the model's output")
        return (x.float() - self.sigma[k] * output.float()) / self.alpha[k]

    def noise(self, x: Tensor, data: Tensor, k: int) -> Tensor:
        """The output at step ``k``, ``[rows, ...]``, that means ``x0 = data``."""
        return (x.float() - self.alpha[k] * data) / self.sigma[k]


class Anchors:
    """The late phase that ZEUS and SADA share: x0 is stored at every ``interval``-th step, and
    once ``points`` are stored all other steps take the Lagrange polynomial through the last of
    them."""

    def __init__(self, first: int, end: int, interval: int, points: int) -> None:
        self.first, self.end, self.interval, self.points = first, end, interval, points
        self.nodes: list[int] = []
        self.values: list[Tensor] = []  # [rows, ...] each

    def hit(self, k: int) -> bool:
        """Whether step ``k`` is one whose x0 is stored."""
        return self.first <= k < self.end and (k - self.first) % self.interval == 0

    def store(self, k: int, data: Tensor) -> None:
        """Keeps x0 of step ``k``."""
        self.nodes = [*self.nodes, k][-self.points :]
        self.values = [*self.values, data][-self.points :]

    def predict(self, k: int) -> Tensor | None:
        """x0 at step ``k``, ``[rows, ...]``; None while too few are stored, or at the end."""
        if len(self.nodes) < self.points or k >= self.end:
            return None
        weights = extrapolation_weights(self.nodes, k)
        return sum(
            (w * value for w, value in zip(weights[1:], self.values[1:], strict=True)),
            start=weights[0] * self.values[0],
        )


@dataclass(frozen=True, kw_only=True)
class Zeus:
    """ZEUS (arXiv 2604.01552): a fixed pattern, extrapolation and hold in turns, late Lagrange.

    Published for 50 steps: one step of 3 inside steps 10 to 45, x0 stored every 4th step from 24,
    4 points. The numbers scale with the steps. ``psi_k`` and ``psi_{k-1}`` are read as the last
    two computed outputs. Computed are the steps divisible by ``every``: that phase is ours.

    Attributes:
        every: One step of so many is computed inside the range.
        begin: First fraction of the steps that may skip.
        end: Fraction of the steps from which all are computed again.
        late: Whether the late phase switches to Lagrange interpolation of x0.
        exploding: Whether the scheduler's latents are those of Euler, ``x0 + sigma eps``.
    """

    every: int = 3
    begin: float = 0.2
    end: float = 0.9
    late: bool = True
    exploding: bool = False

    def criterion(self) -> Criterion:
        """A fresh decision state."""
        return ZeusPattern(self)


def late_phase(steps: int, end: float, points: int) -> Anchors:
    """The published late phase, scaled from 50 steps."""
    return Anchors(round(0.48 * steps), round(end * steps), max(2, round(0.08 * steps)), points)


class ZeusPattern(Pattern):
    """The decisions of `Zeus`."""

    def __init__(self, settings: Zeus) -> None:
        self.settings = settings
        super().__init__(self._in_pattern, "interleave")

    def _in_pattern(self, _row: int, k: int, steps: int) -> bool:
        s = self.settings
        return not round(s.begin * steps) <= k < round(s.end * steps) or k % s.every == 0

    def start(self, course: Course) -> None:
        """A trajectory begins."""
        super().start(course)
        if self.settings.late:
            self.levels = Levels(course, self.settings.exploding)
            self.anchors = late_phase(self.steps, self.settings.end, points=4)

    def observe(self, seen: Observation) -> Decision:
        """Decides the step after ``seen``."""
        if not self.settings.late:
            return super().observe(seen)
        self.note(seen)
        k, rows = seen.step + 1, len(seen.computed)
        if self.anchors.hit(seen.step):
            self.anchors.store(seen.step, self.levels.data(seen.x, seen.output, seen.step))
        if self.anchors.hit(k):
            return self.decision([True] * rows, k)
        data = self.anchors.predict(k)
        if data is None:
            return self.decision([self._in_pattern(0, k, self.steps)] * rows, k)
        return reuse_data(self.levels, seen.x_next, data, k, [False] * rows)


def reuse_data(
    levels: Levels,
    x: Tensor,  # [rows, ...]
    data: Tensor,  # [rows, ...]
    k: int,
    compute: list[bool],
    reasons: list[str] | None = None,
    value: Tensor | None = None,
) -> Decision:
    """Rows that skip step ``k`` go on as if the model had predicted ``x0 = data`` there."""
    return Decision(
        compute=compute,
        reasons=reasons or ["pattern" if c else "skipped" for c in compute],
        value=value,
        weights=[(0.0,)] * len(compute),
        offset=levels.noise(x, data, k),
    )


@dataclass(frozen=True, kw_only=True)
class Sada:
    """SADA (Jiang et al., ICML 2025): skip where the trajectory bends back onto its extrapolation.

    After step k, inside steps 10 to 47 of 50, a row may skip the next one if

        mean (x_{k+1} - (3 x_k - 3 x_{k-1} + x_{k-2})) . (y_k - 2 y_{k-1} + y_{k-2}) <= 0

    with ``y = dx/dt`` along the probability-flow ODE, at most ``max_interval`` skips in a row. It
    then goes on with an approximated ``x0 = (z - sigma eps) / alpha``: eps the last output, held,
    and z the latent by a step of the third-order rule

        z = x_k - (5/6) y_k - (5/6) y_{k-1} + (2/3) y_{k-2}

    or late (`Anchors`: from step 24, every 4th, 4 points) by Lagrange interpolation of x0. After
    the published description; ours are: decisions by row instead of by batch; time counted in
    steps; y from the model's output, by ``dx/dlambda = sigma^2 x - sigma eps`` (without the first
    term for Euler's latents) times the grid's own dlambda/dt. The token-wise part is left out.

    Attributes:
        max_interval: Most skips in a row.
        begin: First fraction of the steps that may skip.
        end: Fraction of the steps from which all are computed again.
        late: Whether the late phase switches to Lagrange interpolation of x0.
        exploding: Whether the scheduler's latents are those of Euler, ``x0 + sigma eps``.
    """

    max_interval: int = 4
    begin: float = 0.2
    end: float = 0.94
    late: bool = True
    exploding: bool = False

    def criterion(self) -> Criterion:
        """A fresh decision state."""
        return SadaCriterion(self)


class SadaCriterion:
    """The decisions of `Sada`."""

    history = 1

    def __init__(self, settings: Sada) -> None:
        self.settings = settings

    def start(self, course: Course) -> None:
        """A trajectory begins."""
        if course.steps is None:
            raise ValueError("Sada: the number of steps is unknown, expected the host's plan")
        s, self.steps = self.settings, course.steps
        self.levels = Levels(course, s.exploding)
        # Time falls by 1 a step.
        self.rates = (-np.gradient(self.levels.log_snr)).tolist()
        self.window = range(round(s.begin * self.steps), round(s.end * self.steps))
        self.anchors = late_phase(self.steps, s.end, points=4)
        self.skips = [0] * course.rows
        self.past: list[tuple[Tensor, Tensor]] = []  # (x, y) of the last three steps

    def observe(self, seen: Observation) -> Decision:
        """Decides the step after ``seen``."""
        k, rows = seen.step + 1, len(seen.computed)
        data = self.levels.data(seen.x, seen.output, seen.step)
        x = seen.x.float()
        self.past = [*self.past, (x, self._gradient(x, seen))][-3:]
        self.skips = [
            0 if c else skips + 1 for c, skips in zip(seen.computed, self.skips, strict=True)
        ]
        late = self.settings.late
        if late and self.anchors.hit(seen.step):
            self.anchors.store(seen.step, data)
        if len(self.past) < 3 or k not in self.window:
            return Decision(compute=[True] * rows, reasons=["warm-up"] * rows)
        if late and self.anchors.hit(k):
            return Decision(compute=[True] * rows, reasons=["anchor"] * rows)
        approximated = self.anchors.predict(k) if late else None
        value = self._stability(seen.x_next.float())
        reasons = [self._reason(row, stable) for row, stable in enumerate((value <= 0).tolist())]
        if approximated is None:
            (_, y2), (_, y1), (_, y0) = self.past
            z = x - (5 / 6) * y0 - (5 / 6) * y1 + (2 / 3) * y2
            approximated = self.levels.data(z, seen.output, k)
        compute = [reason != "skipped" for reason in reasons]
        return reuse_data(self.levels, seen.x_next, approximated, k, compute, reasons, value)

    def _gradient(self, x: Tensor, seen: Observation) -> Tensor:
        """``y = dx/dt``, ``[rows, ...]``."""
        assert seen.output is not None  # x0 was formed from it
        sigma, k = self.levels.sigma[seen.step], seen.step
        drift = 0.0 if self.settings.exploding else sigma * sigma
        return self.rates[k] * (drift * x - sigma * seen.output.float())

    def _stability(self, x_next: Tensor) -> Tensor:
        """The criterion's mean product, ``[rows]``."""
        (x2, y2), (x1, y1), (x0, y0) = self.past
        bend = x_next - (3 * x0 - 3 * x1 + x2)
        return (bend * (y0 - 2 * y1 + y2)).flatten(1).mean(1)

    def _reason(self, row: int, stable: bool) -> str:
        if self.skips[row] >= self.settings.max_interval:
            return "cap"
        return "skipped" if stable else "criterion"
