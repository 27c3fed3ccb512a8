"""Time grids: at which times the model is called, and where the last step lands.

A grid turns a schedule and a number of model calls into ``steps + 1`` falling times: the calls,
and the end point. Grids work in continuous time; nothing is rounded unless ``integer`` is set.
The end is ``"zero"`` (the clean end of the schedule), ``"sigma_min"`` (the schedule's least noisy
time) or a time. A grid spaced in sigma or lambda that ends at zero puts its last call at the least
noisy time and then jumps; one that ends elsewhere spreads its calls up to that end, so no call is
spent on a step of length zero.

Source: DPM-Solver (Lu et al. 2022) section 3 and the official code; EDM (Karras et al. 2022) eq. 5;
Common Diffusion Noise Schedules (Lin et al. 2023) Table 2 for leading and trailing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sidestep.runtime.schedules import FlowMatching, Schedule
from sidestep.runtime.schedules.base import Array


@dataclass(frozen=True, kw_only=True)
class Grid(ABC):
    """Where the calls are; subclasses say how they are spaced.

    Attributes:
        final: ``"zero"``, ``"sigma_min"``, or the schedule time where the last step lands.
        start: The schedule time of the first call; None for the noisy end.
    """

    final: str | float = "zero"
    start: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.final, str) and self.final not in ("zero", "sigma_min"):
            raise ValueError(
                f"{type(self).__name__}: final is {self.final!r}, "
                "expected zero, sigma_min or a time"
            )

    def times(self, schedule: Schedule, steps: int) -> Array:
        """``[steps + 1]`` falling times, the last of which is the end.

        Raises:
            ValueError: ``steps`` is below 1, or start and end are the wrong way round.
        """
        if steps < 1:
            raise ValueError(f"{type(self).__name__}: steps is {steps}, expected at least 1")
        start = schedule.t_max if self.start is None else float(self.start)
        if not 0 <= self.end(schedule) < start:
            raise ValueError(
                f"{type(self).__name__}: goes from time {start} to {self.end(schedule)}, "
                "expected start > end >= 0"
            )
        return np.asarray(self._times(schedule, steps, start), dtype=np.float64)

    def end(self, schedule: Schedule) -> float:
        """The time where the last step lands."""
        if self.final == "zero":
            return 0.0
        return float(schedule.finite[0] if self.final == "sigma_min" else self.final)

    @abstractmethod
    def _times(self, schedule: Schedule, steps: int, start: float) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class TimeUniform(Grid):
    """Even in time, or in a root of time: ``t = ((1 - i/n) T^(1/p) + i/n t_min^(1/p))^p``.

    Attributes:
        power: ``p``; 2 is DPM-Solver's ``time_quadratic``.
        endpoint: With ``final="zero"``: whether the last call is at the least noisy time (as in
            diffusers' Euler and DDIM) or one spacing before it (as in its DPM-Solver).
        integer: Round to whole training timesteps, as diffusers does.
        shift: Moves times in [0, 1] towards noise, ``t' = shift t / (1 + (shift - 1) t)``.
    """

    power: float = 1.0
    endpoint: bool = False
    integer: bool = False
    shift: float = 1.0

    def _times(self, schedule: Schedule, steps: int, start: float) -> Array:
        end = self.end(schedule)
        if self.final == "zero":
            end = schedule.finite[0] if self.endpoint else schedule.t_min
        points = steps if self.endpoint and self.final == "zero" else steps + 1
        if self.shift != 1.0 and schedule.t_max > 1.0:
            raise ValueError("TimeUniform: shift needs times in [0, 1], not those of a VE schedule")
        root = 1.0 / self.power
        times = np.linspace(start**root, end**root, points) ** self.power
        times[0] = start
        times = self.shift * times / (1.0 + (self.shift - 1.0) * times)
        return _finish(self, schedule, times[:steps])


@dataclass(frozen=True, kw_only=True)
class Leading(Grid):
    """Every ``N / n``-th training timestep, counted from the clean end.

    Attributes:
        offset: Training timesteps added to each (``steps_offset``; 1 in Stable Diffusion).
        endpoint: Whether timestep ``offset`` itself is called (diffusers' DDIM, PNDM and Euler);
            its DPM-Solver leaves it out and spaces the calls ``N / (n + 1)`` apart.
        integer: Round the spacing down to whole timesteps, as diffusers does.
    """

    offset: int = 0
    endpoint: bool = True
    integer: bool = False

    def _times(self, schedule: Schedule, steps: int, start: float) -> Array:
        if schedule.train_steps is None:
            raise ValueError("Leading: the schedule is continuous, expected one of N timesteps")
        train = round(start * schedule.train_steps)
        spacing = train / (steps if self.endpoint else steps + 1)
        if self.integer:
            spacing = float(int(spacing))
        first = 0 if self.endpoint else 1
        index = np.arange(steps - 1 + first, first - 1, -1) * spacing + self.offset
        if index[0] > train - 1:
            raise ValueError(f"Leading: offset {self.offset} puts the first call above timestep N")
        return _finish(self, schedule, (index + 1.0) / schedule.train_steps)


@dataclass(frozen=True, kw_only=True)
class Trailing(Grid):
    """Even in time, counted from the noisy end, so that the first call is at pure noise.

    Attributes:
        integer: Round to whole training timesteps, as diffusers does.
    """

    integer: bool = False

    def _times(self, schedule: Schedule, steps: int, start: float) -> Array:
        return _finish(self, schedule, np.linspace(start, 0.0, steps + 1)[:-1])


@dataclass(frozen=True, kw_only=True)
class LogSNR(Grid):
    """Even in ``lambda``: DPM-Solver's ``logSNR``, diffusers' ``exponential`` and ``lu``."""

    def _times(self, schedule: Schedule, steps: int, start: float) -> Array:
        return _spread(
            self, schedule, steps, start, schedule.log_snr, schedule.t_from_log_snr, np.linspace
        )


@dataclass(frozen=True, kw_only=True)
class Karras(Grid):
    """Even in ``sigma^(1 / rho)`` (EDM eq. 5).

    Attributes:
        rho: 7 as published.
    """

    rho: float = 7.0

    def _times(self, schedule: Schedule, steps: int, start: float) -> Array:
        def even(high: float, low: float, points: int) -> Array:
            return np.linspace(high ** (1 / self.rho), low ** (1 / self.rho), points) ** self.rho

        return _spread(
            self, schedule, steps, start, schedule.noise_level, schedule.t_from_noise_level, even
        )


@dataclass(frozen=True, kw_only=True)
class Beta(Grid):
    """At the quantiles of a beta distribution: dense at both ends.

    Attributes:
        a: First parameter of the distribution.
        b: Second parameter.
        of: What is distributed: ``time`` (as its users mean it) or ``sigma`` (as diffusers does).
    """

    a: float = 0.6
    b: float = 0.6
    of: str = "time"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in ("time", "sigma"):
            raise ValueError(f"Beta: of is {self.of!r}, expected time or sigma")

    def _times(self, schedule: Schedule, steps: int, start: float) -> Array:
        from scipy.special import betaincinv

        def even(high: float, low: float, points: int) -> Array:
            return low + (high - low) * betaincinv(self.a, self.b, np.linspace(1, 0, points))

        if self.of == "time":
            return _spread(self, schedule, steps, start, np.asarray, np.asarray, even)
        return _spread(
            self, schedule, steps, start, schedule.noise_level, schedule.t_from_noise_level, even
        )


@dataclass(frozen=True, kw_only=True)
class Custom(Grid):
    """Times given one by one, as sigmas or as training timesteps.

    Attributes:
        sigmas: Falling noise levels (`Schedule.noise_level`). A last 0 is the end itself and
            replaces ``final``.
        timesteps: Falling training timesteps of a discrete schedule, or model times of a flow.
    """

    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sigmas is None) == (self.timesteps is None):
            raise ValueError("Custom: expected either sigmas or timesteps")

    def times(self, schedule: Schedule, steps: int | None = None) -> Array:
        """As `Grid.times`; ``steps`` may be left out, else it must be the number of calls."""
        times = self._given(schedule)
        if times[-1] > self.end(schedule) and times[-1] > 0:
            times = np.append(times, self.end(schedule))
        if steps is not None and steps != len(times) - 1:
            raise ValueError(f"Custom: steps is {steps}, expected the {len(times) - 1} of the grid")
        return times

    def _given(self, schedule: Schedule) -> Array:
        if self.sigmas is not None:
            return schedule.t_from_noise_level(np.asarray(self.sigmas, dtype=np.float64))
        timesteps = np.asarray(self.timesteps, dtype=np.float64)
        if schedule.train_steps is not None:
            return (timesteps + 1.0) / schedule.train_steps
        if isinstance(schedule, FlowMatching):
            return schedule.t_from_noise_level(timesteps / schedule.time_scale)
        raise ValueError("Custom: timesteps need a discrete schedule or a flow, expected sigmas")

    def _times(self, schedule: Schedule, steps: int, start: float) -> Array:
        raise AssertionError("Custom overrides times")


def _finish(grid: TimeUniform | Leading | Trailing, schedule: Schedule, calls: Array) -> Array:
    """Rounds the calls where that is asked for, and adds the end."""
    if grid.integer:
        if schedule.train_steps is None:
            raise ValueError(
                f"{type(grid).__name__}: integer needs a discrete schedule, got a continuous one"
            )
        ordinal = calls * schedule.train_steps
        shift = 0.0 if isinstance(grid, Trailing) else 1.0
        # halves are rounded to even whatever the last digit of `calls` is
        index = np.round(np.round(ordinal - shift, 6)) + shift - 1.0
        calls = (index + 1.0) / schedule.train_steps
    return np.append(calls, grid.end(schedule))


def _spread(
    grid: Grid,
    schedule: Schedule,
    steps: int,
    start: float,
    measure: Callable[[float], Array],
    inverse: Callable[[Array], Array],
    even: Callable[[float, float, int], Array],
) -> Array:
    """``even`` points of ``measure(t)`` from the start to the end, the exact ends kept.

    Where ``measure`` is infinite at the start (no signal at all), the spacing begins at the last
    finite time, and the first call is moved from there to the start.
    """
    low, high = schedule.finite
    zero = grid.final == "zero"
    last = low if zero else grid.end(schedule)
    first = start if np.isfinite(measure(start)) else min(high, start)
    points = steps if zero else steps + 1
    times = np.array(inverse(even(float(measure(first)), float(measure(last)), points)))
    times[-1] = last
    times[0] = start
    return np.append(times, 0.0) if zero else times


GRIDS: dict[str, Grid] = {
    "linspace": TimeUniform(),
    "linspace-endpoint": TimeUniform(endpoint=True),
    "leading": Leading(),
    "trailing": Trailing(),
    "quadratic": TimeUniform(power=2.0),
    "logsnr": LogSNR(),
    "exponential": LogSNR(),
    "lu": LogSNR(),
    "karras": Karras(),
    "beta": Beta(),
    "beta-sigma": Beta(of="sigma"),
    "flow-shift": TimeUniform(shift=3.0),
}


def find_grid(name: str) -> Grid:
    """The grid of that name.

    Raises:
        ValueError: There is none; the message lists them.
    """
    if name not in GRIDS:
        raise ValueError(f"grid {name!r} is unknown, expected one of {', '.join(GRIDS)}")
    return GRIDS[name]
