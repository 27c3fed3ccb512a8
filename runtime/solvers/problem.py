"""What a solver is asked to solve: the points in time, and what the model's output means there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sidestep.runtime.grids import Grid
from sidestep.runtime.predictions import Prediction
from sidestep.runtime.program import Form, Program
from sidestep.runtime.schedules import Schedule
from sidestep.runtime.thresholding import DynamicThreshold


@dataclass(frozen=True, kw_only=True)
class Point:
    """A time on the trajectory.

    Attributes:
        t: The schedule's time.
        alpha: Signal coefficient of the latent that is integrated.
        sigma: Its noise coefficient.
        log_snr: ``lambda``; infinite at the ends.
    """

    t: float
    alpha: float
    sigma: float
    log_snr: float

    @property
    def finite(self) -> bool:
        """Whether ``lambda`` is a number, which everything above order 1 needs."""
        return math.isfinite(self.log_snr)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One model call as the solvers see it.

    Attributes:
        point: Where it is made.
        x0: The data prediction, as a form of ``x`` and ``u``.
        eps: The noise prediction.
        step: Arguments of `Program.step` that do not depend on the solver.
    """

    point: Point
    x0: Form
    eps: Form
    step: dict[str, Any]

    def value(self, data: bool) -> Form:
        """``m``: what the algorithm integrates."""
        return self.x0 if data else self.eps


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Schedule, prediction type and coordinates.

    Attributes:
        schedule: The noise schedule of the model.
        prediction: What its output means.
        exploding: Integrate ``x / alpha``, whose noise coefficient is ``sigma / alpha``, as
            k-diffusion and diffusers' Euler do, and scale the model's input back.
        threshold: Dynamic thresholding of the data prediction, or None.
        draws: Noise tensors drawn at each step.
    """

    schedule: Schedule
    prediction: Prediction
    exploding: bool = False
    threshold: DynamicThreshold | None = None
    draws: int = 0

    def point(self, t: float) -> Point:
        """The point of the integrated latent at the schedule's time ``t``."""
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        if self.exploding:
            if alpha == 0:
                raise ValueError(
                    "coordinates 've' divide by alpha, which is 0 at the first time of the grid: "
                    "use coordinates 'native', or start the grid later"
                )
            alpha, sigma = 1.0, sigma / alpha
        return Point(t=t, alpha=alpha, sigma=sigma, log_snr=float(self.schedule.log_snr(t)))

    def points(self, grid: Grid, steps: int, *, inverse: bool = False) -> list[Point]:
        """The grid's points; a repeated one is dropped, as a step between them does nothing.

        Raises:
            ValueError: The times do not run one way.
        """
        points: list[Point] = []
        for t in grid.times(self.schedule, steps).tolist():
            point = self.point(t)
            if points and _same(point.log_snr, points[-1].log_snr):
                continue
            if points and point.log_snr < points[-1].log_snr:
                raise ValueError(f"the grid turns back at time {t}, expected falling times")
            points.append(point)
        return points[::-1] if inverse else points

    def call(self, point: Point) -> Call:
        """The model call at a point.

        Raises:
            ValueError: The prediction says nothing there, or only an infinite amount.
        """
        alpha = float(self.schedule.alpha(point.t))
        sigma = float(self.schedule.sigma(point.t))
        scale = alpha if self.exploding else 1.0
        try:
            a, b = self.prediction.data(alpha, sigma)
            c, d = self.prediction.noise(alpha, sigma)
        except ZeroDivisionError as error:
            raise ValueError(
                f"a model that predicts {self.prediction.name!r} cannot be called at time "
                f"{point.t}, where alpha is {alpha:.3g} and sigma {sigma:.3g}: start the grid later"
            ) from error
        x, u = Program.x, Program.u
        x0, eps = a * scale * x + b * u, c * scale * x + d * u
        step: dict[str, Any] = {
            "t": self.schedule.model_time(point.t),
            "scale": scale * self.prediction.input_scale(sigma),
            "log_snr": point.log_snr,
            "draws": self.draws,
        }
        if self.threshold is not None:
            step["data"] = x0
            x0 = u
            eps = (x - point.alpha * x0) / point.sigma
        return Call(point=point, x0=x0, eps=eps, step=step)

    def initial_scale(self, first: Point) -> float:
        """What unit noise is multiplied by to start at ``first``."""
        scale = self.schedule.initial_scale(first.t)
        return scale / float(self.schedule.alpha(first.t)) if self.exploding else scale


def _same(a: float, b: float) -> bool:
    """Whether two log-SNR are equal up to rounding, infinities included."""
    return a == b or abs(a - b) < 1e-9
