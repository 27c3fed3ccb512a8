"""`sample`: our solvers in the dialect of k-diffusion, for a model that is any callable.

The latent is ``x = x0 + sigma eps``, the model returns its estimate of ``x0`` ("denoised"), and the
noise levels are given one by one: a variance exploding schedule, the data prediction, and a grid of
the caller's own. Step ``i`` goes from ``sigmas[i]`` to ``sigmas[i + 1]`` with as many calls as the
solver's order asks for, as the samplers of that dialect do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import trange

from sidestep.kernels import PreparedStep
from sidestep.kernels.checks import MODEL_DTYPES
from sidestep.runtime.grids import Grid
from sidestep.runtime.plan import Plan
from sidestep.runtime.plan_course import plan_course
from sidestep.runtime.schedules import Schedule, VarianceExploding
from sidestep.runtime.schedules.base import Array
from sidestep.runtime.solvers import DEFAULT_SOLVER, Solver, find_solver
from sidestep.runtime.stepwise import Stepwise
from sidestep.runtime.summary import Summary

if TYPE_CHECKING:
    from sidestep.runtime.methods.criterion import Method

_LEAST_FALL = 1e-8  # relative: a smaller one is rounding


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    x: Tensor,  # [B, ...]
    sigmas: Tensor | Sequence[float],  # [n + 1]
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    solver: str | Solver = DEFAULT_SOLVER,
    method: Method | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    report: Callable[[Summary], object] | None = None,
) -> Tensor:  # [B, ...]
    """Samples in n steps, from ``sigmas[0]`` to ``sigmas[n]``.

        x = torch.randn(4, 4, 64, 64) * sigmas[0]
        x = sidestep.sample(model, x, sigmas, extra_args={"cond": cond}, solver="dpmsolver++2m")

    Args:
        model: ``model(x, sigma, **extra_args) -> denoised``, with ``sigma`` ``[B]``, all in the
            dtype of ``x``.
        x: The latent at ``sigmas[0]``, already scaled by it.
        sigmas: Falling noise levels, usually down to 0.
        extra_args: Further arguments of the model, by name. A method that skips rows takes the rows
            of every tensor ``[B, ...]`` in them.
        callback: Called in every step, after its first model call, with ``x``, ``i``, ``sigma``,
            ``sigma_hat`` (the same: nothing is added) and ``denoised``.
        disable: Whether to show no progress bar; None for none unless in a terminal.
        solver: A name of `sidestep.runtime.solvers.SOLVERS`, or the settings themselves.
        method: Which model calls to make: settings such as `Adaptive`; None for all.
        generator: Of the noise of a stochastic solver: one, or one for each row; None for torch's.
        noise_sampler: ``noise_sampler(sigma, sigma_next)`` returns that noise, ``[B, ...]``.
        report: Called at the end with the `Summary` of what a method did.

    Returns:
        The latent at ``sigmas[n]``. Between the calls it is kept in float32.

    Raises:
        ValueError: The sigmas do not fall, the batch is empty, or arguments contradict each other.
    """
    levels = _checked_sigmas(sigmas)
    _check_latent(x)
    settings = find_solver(solver) if isinstance(solver, str) else solver
    calls = _calls(settings, levels)
    _check_method(settings, calls, method, report)
    plan = _plan(settings, tuple(levels.tolist()), sum(calls))
    noise = _noise(plan, float(levels[-1]), x, generator, noise_sampler)
    driver = None if method is None else Stepwise(method.criterion(), method=repr(method))
    if driver is not None:
        driver.begin(plan_course(plan))
    call = functools.partial(_evaluate, model, dict(extra_args or {}), driver)
    state = _State.start(plan, x)
    try:
        for i in trange(len(calls), disable=disable):
            show = functools.partial(_show, callback, sigmas, levels, i)
            _take_step(state, call, calls[i], noise, driver, show)
    finally:
        if driver is not None:
            driver.release()
    if driver is not None and report is not None:
        report(driver.summary())
    return state.x


def _show(
    callback: Callable[[dict[str, Any]], object] | None,
    sigmas: Tensor | Sequence[float],
    levels: Tensor,
    i: int,
    x: Tensor,
    denoised: Tensor,
) -> None:
    """Calls back in the dialect of k-diffusion."""
    sigma = sigmas[i] if isinstance(sigmas, Tensor) else levels[i]
    if callback is not None:
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})


def _take_step(
    state: _State,
    call: Callable[[Tensor, Tensor], Tensor],
    calls: int,
    noise: Callable[[int], Tensor | None],
    driver: Stepwise | None,
    show: Callable[[Tensor, Tensor], None],
) -> None:
    """From one of the given noise levels to the next, in that many model calls."""
    for j in range(calls):
        x = state.x
        denoised = call(x, x.new_full((len(x),), float(state.plan.timesteps[state.k])))
        if j == 0:
            show(x, denoised)
        state.advance(denoised, noise(state.k))
        if driver is not None:
            driver.observe(x, state.x, denoised, state.step_sizes)


def _evaluate(
    model: Callable[..., Tensor],
    extra_args: dict[str, Any],
    driver: Stepwise | None,
    x: Tensor,  # [B, ...]
    sigma: Tensor,  # [B]
) -> Tensor:  # [B, ...]
    """One model call, or what a method has in its place.

    Raises:
        ValueError: The model returned another shape.
        TypeError: It returned no tensor.
    """
    if driver is None:
        denoised = model(x, sigma, **extra_args)
    else:
        denoised = driver.predict(model, (x, sigma), extra_args)
    if not isinstance(denoised, Tensor):
        raise TypeError(
            f"sample: the model returned a {type(denoised).__name__}, expected the denoised tensor"
        )
    if denoised.shape != x.shape:
        raise ValueError(
            f"sample: the model returned shape {list(denoised.shape)}, expected {list(x.shape)}"
        )
    return denoised


@dataclass
class _State:
    """The latent between two calls: fp32 registers, and what the model reads of them."""

    plan: Plan
    fused: PreparedStep
    x: Tensor  # [B, ...] in the caller's dtype; a tensor of its own after every step
    k: int = 0

    @staticmethod
    def start(plan: Plan, x: Tensor) -> _State:
        rows = len(x)
        state: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
        registers = torch.zeros(rows, plan.registers, x[0].numel(), **state)
        registers[:, 0] = x.flatten(1)
        fused = PreparedStep(
            registers=registers,
            weights=torch.ones(rows, 1, **state),
            table=plan.table(x.device),
            step=torch.zeros(rows, dtype=torch.int64, device=x.device),
            slot=None,
            stats=torch.zeros(rows, 2, **state),
        )
        return _State(plan=plan, fused=fused, x=x)

    def advance(
        self,
        denoised: Tensor,  # [B, ...]
        noise: Tensor | None,  # [B, ...] fp32
    ) -> None:
        """Takes one step of the plan."""
        dtype = self.x.dtype if self.x.dtype in MODEL_DTYPES else torch.float32
        output = denoised.to(dtype).contiguous()
        following = torch.empty_like(output)
        self.fused(output, noise, model_input=following)  # the input scales of this plan are 1
        self.fused.step.add_(1)
        self.x = following.to(self.x.dtype)
        self.k += 1

    @property
    def step_sizes(self) -> Tensor:  # [B]
        """``mean |x' - x|`` of the last step."""
        return self.fused.stats[:, 0]


@dataclass(frozen=True, kw_only=True)
class _Given(Grid):
    """The noise levels as they were given, however many calls a step makes."""

    sigmas: tuple[float, ...]

    def times(self, schedule: Schedule, steps: int) -> Array:
        return np.array(self.sigmas)

    def end(self, schedule: Schedule) -> float:
        return self.sigmas[-1]

    def _times(self, schedule: Schedule, steps: int, start: float) -> Array:
        raise AssertionError("_Given overrides times")


@functools.lru_cache(maxsize=16)
def _plan(solver: Solver, sigmas: tuple[float, ...], calls: int) -> Plan:
    """The solver on these levels, with whole steps from each to the next."""
    if solver.method == "singlestep" or solver.algorithm == "heun":
        # towards sigma = 0 the last step is of order 1, which only "fast" mixes in
        solver = solver.replace(inner="uniform", orders="fixed" if sigmas[-1] > 0 else "fast")
    schedule = VarianceExploding(sigma_min=0.5 * min(s for s in sigmas if s), sigma_max=sigmas[0])
    return solver.plan(schedule, _Given(sigmas=sigmas), calls, prediction="sample")


def _calls(solver: Solver, levels: Tensor) -> list[int]:
    """Model calls of every step.

    Raises:
        ValueError: The solver does not go from level to level as they are given.
    """
    for name in ("inverse", "denoise_to_zero"):
        if getattr(solver, name):
            raise ValueError(
                f"sample: the solver has {name}=True, expected False: the sigmas say where the "
                "trajectory goes"
            )
    intervals = len(levels) - 1
    to_zero = float(levels[-1]) == 0
    if solver.method == "singlestep" or solver.algorithm == "heun":
        calls = [solver.order] * intervals
        if to_zero:
            calls[-1] = 1
        return calls
    calls = [1] * intervals
    if solver.start_order == "singlestep" and not (intervals == 1 and to_zero):
        calls[0] = 2
    return calls


def _checked_sigmas(sigmas: Tensor | Sequence[float]) -> Tensor:  # [n + 1] float64, on the CPU
    """The noise levels.

    Raises:
        ValueError: They are not a falling sequence of at least two numbers from 0 up.
    """
    given = sigmas.detach() if isinstance(sigmas, Tensor) else sigmas
    levels = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    if levels.dim() != 1 or len(levels) < 2:
        raise ValueError(
            f"sample: sigmas has shape {list(levels.shape)}, expected [n + 1] with n at least 1"
        )
    if not bool(levels.isfinite().all()):
        at = int(torch.nonzero(~levels.isfinite())[0])
        raise ValueError(f"sample: sigmas[{at}] is {float(levels[at])}, expected a finite number")
    if bool((levels < 0).any()):
        at = int(torch.nonzero(levels < 0)[0])
        raise ValueError(f"sample: sigmas[{at}] is {float(levels[at])}, expected 0 or above")
    rising = levels[1:] >= levels[:-1] * (1 - _LEAST_FALL)
    if bool(rising.any()):
        at = int(torch.nonzero(rising)[0])
        raise ValueError(
            f"sample: sigmas[{at}] is {float(levels[at])} and sigmas[{at + 1}] "
            f"{float(levels[at + 1])}, expected falling noise levels"
        )
    return levels


def _check_latent(x: Tensor) -> None:
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"sample: x has shape {list(x.shape)}, expected [B, ...] with at least one row"
        )
    if not x.is_floating_point():
        raise TypeError(f"sample: x has dtype {x.dtype}, expected a floating-point one")


def _check_method(
    solver: Solver,
    calls: Sequence[int],
    method: Method | None,
    report: Callable[[Summary], object] | None,
) -> None:
    """Raises ValueError where the size of a step does not say how fast the picture changes."""
    if method is None:
        if report is not None:
            raise ValueError("sample: report was given without a method, expected both or neither")
        return
    if max(calls) > 1:
        raise ValueError(
            f"sample: {solver.label} makes {max(calls)} model calls a step, and part steps do not "
            "measure how fast the picture changes; use a multistep solver with a method"
        )
    if solver.stochastic:
        raise ValueError(
            f"sample: {solver.label} adds noise at every step, which hides how fast the picture "
            "changes; use a deterministic solver with a method"
        )


def _noise(
    plan: Plan,
    last: float,
    x: Tensor,  # [B, ...]
    generator: torch.Generator | Sequence[torch.Generator] | None,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None,
) -> Callable[[int], Tensor | None]:
    """A function that draws the fp32 noise of a step, ``[B, ...]``; None where it uses none.

    Raises:
        ValueError: Two sources were given, or a list of another length than the batch.
    """
    if generator is not None and noise_sampler is not None:
        raise ValueError("sample: generator and noise_sampler were both given, expected one")
    sources = (
        [generator] if generator is None or isinstance(generator, torch.Generator) else [*generator]
    )
    if len(sources) not in (1, len(x)):
        raise ValueError(f"sample: {len(sources)} generators, expected one or {len(x)}")
    ends = torch.tensor([*plan.timesteps, last], device="cpu")

    def draw(k: int) -> Tensor | None:
        if plan.used_draw(k) is None:
            return None
        if noise_sampler is not None:
            drawn = noise_sampler(ends[k], ends[k + 1])
            if drawn.shape != x.shape:
                raise ValueError(
                    f"sample: noise_sampler returned shape {list(drawn.shape)}, "
                    f"expected {list(x.shape)}"
                )
            return drawn.float().contiguous()
        rows = len(x) // len(sources)
        parts = [
            torch.randn(
                rows,
                *x.shape[1:],
                generator=g,
                dtype=torch.float32,
                device=x.device if g is None else g.device,
            ).to(x.device)
            for g in sources
        ]
        return torch.cat(parts)

    return draw
