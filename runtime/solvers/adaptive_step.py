"""DPM-Solver-12 and DPM-Solver-23: the step size follows the error, in plain torch.

Each step compares a singlestep solver of order p with one of order p - 1 that shares its calls:

    E = rms((x_p - x_{p-1}) / max(atol, rtol max(|x_{p-1}|, |x_previous|)))

It is taken if ``E <= 1``, and the next one is ``theta h E^(-1/p)`` long in lambda. The value at the
start of a refused step is kept, so a refusal costs p - 1 calls.

Source: DPM-Solver (Lu et al. 2022), Algorithm 3 and Appendix C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.runtime.plan import Model
from sidestep.runtime.predictions import Prediction, find_prediction
from sidestep.runtime.program import Form
from sidestep.runtime.schedules import Schedule
from sidestep.runtime.solvers.exponential import Integrator
from sidestep.runtime.solvers.problem import Point, Problem
from sidestep.runtime.solvers.singlestep import Singlestep
from sidestep.runtime.thresholding import DynamicThreshold


@dataclass(frozen=True, kw_only=True)
class AdaptiveStepResult:
    """What came out, and what it took.

    Attributes:
        x: ``[B, ...]``, the latent at the end.
        calls: Model calls for each row, ``B`` numbers.
        refused: Steps that were tried and not taken, for each row.
        times: The accepted schedule times, start and end included, for each row.
        capped: Whether ``max_calls`` ended the error control of any row.
    """

    x: Tensor
    calls: tuple[int, ...]
    refused: tuple[int, ...]
    times: tuple[tuple[float, ...], ...]
    capped: bool


@dataclass(frozen=True, kw_only=True)
class AdaptiveStep:
    """DPM-Solver-12 (``order=2``) or -23 (``order=3``).

    Attributes:
        algorithm: ``dpmsolver`` (as published) or ``dpmsolver++``.
        order: 2 or 3.
        atol: Absolute tolerance; 0.0078 is 2/256, for pictures in [-1, 1].
        rtol: Relative tolerance.
        h_init: The first step in lambda.
        theta: Safety factor of the step size.
        per_sample: Give every row its own steps; else all rows take the steps of the worst one.
        max_calls: About this many calls a row at most: the last of them goes straight to the end.
        denoise_to_zero: Make one more call at the end, and return its data prediction.

    Raises:
        ValueError: A setting is out of its range.
    """

    algorithm: str = "dpmsolver"
    order: int = 3
    atol: float = 0.0078
    rtol: float = 0.05
    h_init: float = 0.05
    theta: float = 0.9
    per_sample: bool = False
    max_calls: int = 1000
    denoise_to_zero: bool = False

    def __post_init__(self) -> None:
        if self.algorithm not in ("dpmsolver", "dpmsolver++"):
            raise ValueError(
                f"AdaptiveStep: algorithm is {self.algorithm!r}, expected dpmsolver or dpmsolver++"
            )
        if self.order not in (2, 3):
            raise ValueError(f"AdaptiveStep: order is {self.order}, expected 2 or 3")
        for name in ("atol", "h_init", "theta", "max_calls"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AdaptiveStep: {name} is {getattr(self, name)}, expected above 0")
        if self.rtol < 0:
            raise ValueError(f"AdaptiveStep: rtol is {self.rtol}, expected 0 or above")

    @torch.no_grad()
    def run(
        self,
        model: Model,
        x: Tensor,  # [B, ...]
        schedule: Schedule,
        prediction: str | Prediction = "epsilon",
        *,
        start: float | None = None,
        end: float | None = None,
        threshold: DynamicThreshold | None = None,
    ) -> AdaptiveStepResult:
        """Integrates from ``start`` to ``end``.

        Args:
            model: ``model(x_in, t) -> u``, as `Plan.run` calls it.
            x: ``[B, ...]``, the latent at ``start``.
            start: Schedule time; None for the noisiest with a finite log-SNR.
            end: Schedule time; None for the least noisy.
            threshold: Dynamic thresholding of the data prediction.

        Raises:
            ValueError: The times are the wrong way round, or lambda is infinite at one of them.
        """
        problem = Problem(
            schedule=schedule, prediction=find_prediction(prediction), threshold=threshold
        )
        low, high = schedule.finite
        first = problem.point(min(schedule.t_max, high) if start is None else start)
        last = problem.point(low if end is None else end)
        if not (first.finite and last.finite and first.log_snr < last.log_snr):
            raise ValueError(
                f"AdaptiveStep: goes from time {first.t} to {last.t}, expected a falling time "
                "between finite log-SNR"
            )
        rows = x.split(1) if self.per_sample else [x]
        done = [_Run(self, model, problem).integrate(row, first, last) for row in rows]
        copies = 1 if self.per_sample else x.shape[0]
        return AdaptiveStepResult(
            x=torch.cat([run.x for run in done]) if done else x,
            calls=tuple(run.calls for run in done for _ in range(copies)),
            refused=tuple(run.refused for run in done for _ in range(copies)),
            times=tuple(tuple(run.times) for run in done for _ in range(copies)),
            capped=any(run.capped for run in done),
        )


class _Run:
    """One integration: the counters, and the step that both orders share."""

    x: Tensor

    def __init__(self, settings: AdaptiveStep, model: Model, problem: Problem) -> None:
        self.settings, self.model, self.problem = settings, model, problem
        self.data = settings.algorithm == "dpmsolver++"
        self.rule = Singlestep(integrator=Integrator(data=self.data), midpoint=True)
        self.calls = self.refused = 0
        self.times: list[float] = []
        self.capped = False

    def integrate(self, x: Tensor, first: Point, last: Point) -> _Run:
        settings, s, previous = self.settings, first, x
        self.times.append(first.t)
        h = min(settings.h_init, last.log_snr - first.log_snr)
        value = self.evaluate(x, s)
        while s is not last:
            self.capped = self.calls + settings.order > settings.max_calls
            if self.capped:
                h = last.log_snr - s.log_snr
            t = self.after(s, h, last)
            lower, higher = self.step(x, value, s, t)
            error = self.error(lower, higher, previous)
            if error <= 1 or self.capped:
                x, previous, s = higher, lower, t
                self.times.append(t.t)
                if s is not last or settings.denoise_to_zero:
                    value = self.evaluate(x, s)
            else:
                self.refused += 1
            growth = settings.theta * max(error, 1e-12) ** (-1.0 / settings.order)
            h = min(growth * h, last.log_snr - s.log_snr)
        if settings.denoise_to_zero:
            x = value if self.data else (x - value * s.sigma) * (1.0 / s.alpha)
        self.x = x
        return self

    def after(self, s: Point, h: float, last: Point) -> Point:
        """The point ``h`` further in lambda; the last one if it is within rounding of that."""
        log_snr = s.log_snr + h
        if last.log_snr - log_snr <= 1e-9:
            return last
        return self.problem.point(float(self.problem.schedule.t_from_log_snr(log_snr)))

    def step(self, x: Tensor, value: Tensor, s: Point, t: Point) -> tuple[Tensor, Tensor]:
        """The results of order p - 1 and of order p at ``t``; makes p - 1 calls."""
        order, rule = self.settings.order, self.rule
        inner = [self.after(s, (t.log_snr - s.log_snr) * i / order, t) for i in range(1, order)]
        values = [value]
        for i, point in enumerate(inner):
            stage = rule.stage(s, point, inner[:i], values, x, final=False)
            values.append(self.evaluate(stage, point))
        lower = rule.stage(s, t, inner[:-1], values[:-1], x, final=True)
        return lower, rule.stage(s, t, inner, values, x, final=True)

    def evaluate(self, x: Tensor, point: Point) -> Tensor:
        """``m`` at a point: one model call."""
        self.calls += 1
        call = self.problem.call(point)
        u = self.model(x * call.step["scale"], call.step["t"])
        if self.problem.threshold is not None:
            u = self.problem.threshold(_evaluate(call.step["data"], x, u))
        return _evaluate(call.value(self.data), x, u)

    def error(self, lower: Tensor, higher: Tensor, previous: Tensor) -> float:
        """``E``: the largest over the rows."""
        settings = self.settings
        size = settings.rtol * torch.maximum(lower.abs(), previous.abs())
        scaled = ((higher - lower) / size.clamp(min=settings.atol)).flatten(1)
        error = float(scaled.square().mean(dim=1).sqrt().amax())
        return error if math.isfinite(error) else math.inf


def _evaluate(form: Form, x: Tensor, u: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for symbol, coefficient in form.items():
        if coefficient != 0:
            total = total + coefficient * (x if symbol == "x" else u)
    return total
