"""Compiling a diffusers scheduler into a `Plan`, by asking it what it does to basis vectors.

At fixed timesteps a scheduler's ``step`` is, for almost every class, a linear map of the latent,
the model's output, the noise and the tensors it keeps between calls.  Fed a basis vector for each
of them, it returns the coefficients of that map.  After every call the tensors that the scheduler
kept are read, as rows of coefficients, and replaced by fresh basis vectors, so that each step is
seen alone and what it keeps becomes the plan's registers.

The scheduler computes its coefficients as it always does, mostly in float32, rounding included;
only the latents that it applies them to are float64.  A plan therefore does what the scheduler
does.  (The solvers of this package compute theirs in float64, from closed forms.)

Basis vectors cannot see a clamp, so the plan is then replayed on random data against the scheduler:
with float64 latents, where the two must agree to 1e-10, and untouched in float32.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestep.runtime.plan import Plan
from sidestep.runtime.probe_reasons import NotLinearError, explain, refusal
from sidestep.runtime.probe_tape import ProbeTape
from sidestep.runtime.program import Form, Program
from sidestep.runtime.scheduler_loop import Leaf, Request, SchedulerLoop
from sidestep.runtime.scheduler_snr import log_snr

_CHANNELS = 4  # as latents have: a scheduler that reads the first three only is found out
_MOST_DRAWS = 4
_EXACT = 1e-10  # float64: the plan is the scheduler
_ROUNDED = 1e-5  # float32: as far as rounding takes a well-conditioned step
_BROKEN = 1e-2  # float32: further than any rounding does


def from_scheduler(
    scheduler: Any,
    num_inference_steps: int,
    *,
    set_timesteps: Mapping[str, Any] | None = None,
    step: Mapping[str, Any] | None = None,
    method: str = "step",
    begin_index: int = 0,
) -> Plan:
    """Compiles a scheduler into a plan; the scheduler itself is not touched.

    Args:
        scheduler: A diffusers scheduler, or anything with the same methods.
        num_inference_steps: As in ``scheduler.set_timesteps``.
        set_timesteps: Its other arguments: ``mu``, ``sigmas``, ``timesteps``... (``device`` is
            ignored: plans are made on the CPU.)
        step: Other arguments of ``scheduler.step``: ``eta``, ``s_churn``, ``order``...
        method: The method that makes a step; ``"step_pred"`` compiles the predictor of the score
            SDE schedulers, whose corrector is not linear.
        begin_index: The model call to begin with, as in ``scheduler.set_begin_index``: what an
            image-to-image pipeline leaves out. A slice of the whole plan is not the same, because
            a multistep scheduler starts again at order 1.

    Returns:
        A plan with one step for every model call that a pipeline would make.

    Raises:
        NotLinearError: The scheduler is no linear program as configured; the message names the
            setting to change.
        ValueError: An argument is unknown, missing, or contradicts another.

    Warns:
        UserWarning: In float32 the scheduler's own rounding takes it further than 1e-5 from the
            plan.
    """
    if reason := refusal(type(scheduler).__name__):
        raise NotLinearError(f"Plan.from_scheduler: {type(scheduler).__name__}: {reason}")
    request = Request(num_inference_steps, set_timesteps or {}, step or {}, method, begin_index)
    request.check(scheduler)
    with torch.no_grad(), _on_the_cpu():
        return _checked_plan(request.prepare(scheduler), request)


def _checked_plan(prepared: Any, request: Request) -> Plan:
    """Probes and replays; raises `NotLinearError` or warns as `from_scheduler` documents."""
    name = type(prepared).__name__
    # A config may carry settings of other classes, which this one does not read.
    known = inspect.signature(type(prepared).__init__).parameters
    settings = {k: v for k, v in getattr(prepared, "config", {}).items() if k in known}
    try:
        plan = _probe(prepared, request)
        exact = replay_error(prepared, request, plan, torch.float64)
        rounded = replay_error(prepared, request, plan, torch.float32)
    except Exception as error:
        symptom = f"its step fails with {type(error).__name__}: {error}"
        raise explain(name, settings, symptom + _repeated_sigma(prepared)) from error
    if not exact < _EXACT or not rounded < _BROKEN:
        symptom = (
            "it is not linear, on random data the plan is "
            f"{exact:.1e} off in float64 (allowed {_EXACT:.0e}) "
            f"and {rounded:.1e} in float32 (allowed {_BROKEN:.0e})"
        )
        raise explain(name, settings, symptom)
    if rounded > _ROUNDED:
        warnings.warn(
            f"Plan.from_scheduler: {name} in float32 loses {rounded:.1e} to cancellation in its "
            "own step; the plan has the same coefficients without that loss",
            stacklevel=4,
        )
    return plan


def _repeated_sigma(prepared: Any) -> str:
    """What to do about a grid so fine that two of its sigmas are one float32."""
    sigmas = getattr(prepared, "sigmas", None)
    if sigmas is None or not (np.diff(np.asarray(sigmas)) == 0).any():
        return ""
    return "; its grid repeats a sigma, set fewer steps"


def _on_the_cpu() -> AbstractContextManager[object]:
    """Undoes ``torch.set_default_device`` for as long as the probe makes tensors."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


class _Basis:
    """A basis vector for everything that one step may read.

    Attributes:
        shape: ``[1, C, 1, N]``, N vectors' coefficients side by side in every channel.
        x: The latent.
        u: The model's output.
        registers: One for each name.
    """

    def __init__(self, names: list[str]) -> None:
        draws = [f"noise{j}" for j in range(_MOST_DRAWS)]
        self.symbols = ["x", "u", *draws, *names]
        size = len(self.symbols)
        self.shape = (1, _CHANNELS, 1, size)
        eye = torch.eye(size, dtype=torch.float64).reshape(size, 1, 1, 1, size)
        self.x, self.u, *rest = eye.repeat(1, 1, _CHANNELS, 1, 1).unbind()
        self._noise, self.registers = rest[:_MOST_DRAWS], rest[_MOST_DRAWS:]

    def noise(self, j: int) -> Tensor:  # [1, C, 1, N]
        if j >= _MOST_DRAWS:
            raise ValueError(f"more than {_MOST_DRAWS} noise tensors drawn in one step")
        return self._noise[j]

    def form(self, value: Tensor) -> Form:  # [1, C, 1, N]
        """The linear form whose coefficients ``value`` holds."""
        if tuple(value.shape) != self.shape:
            raise ValueError(f"a {list(self.shape)} latent became {list(value.shape)}")
        row = value[0, 0, 0].double().numpy()
        if not np.isfinite(row).all():
            raise ValueError("a coefficient is not finite")
        return Form({self.symbols[i]: float(row[i]) for i in np.flatnonzero(row)})


def _probe(prepared: Any, request: Request) -> Plan:
    loop = SchedulerLoop(prepared, request)
    program = Program(loop.name.removesuffix("Scheduler"))
    kept: list[Leaf] = []
    for k, t in enumerate(loop.timesteps):
        basis = _Basis([leaf.path for leaf in kept])
        for leaf, vector in zip(kept, basis.registers, strict=True):
            leaf.replace(vector)
        with ProbeTape(basis.shape, basis.noise) as tape:
            loop.use_noise(tape.noise)
            program.initial_scale = loop.initial_scale
            model_input = basis.form(loop.model_input(k, basis.x))
            if set(model_input) != {"x"}:
                raise ValueError("scale_model_input is not a multiple of the latent")
            x = loop.step(k, basis.u, basis.x)
        kept = loop.registers(basis.shape)
        program.step(
            float(t),
            x=basis.form(x),
            scale=model_input["x"],
            draws=tape.count,
            **{leaf.path: basis.form(leaf.value) for leaf in kept},  # type: ignore[arg-type]
        )
    plan = program.plan()
    known = log_snr(loop.scheduler, plan.timesteps, plan.input_scales, request.begin_index)
    return plan if known is None else replace(plan, log_snr=known)


def replay_error(prepared: Any, request: Request, plan: Plan, dtype: torch.dtype) -> float:
    """How far a plan is from the scheduler it was compiled from, on random data.

    Latent, model outputs and noise are unit normal; both run the whole trajectory on their own.

    Returns:
        max over the steps of ``max |x_plan - x| / max |x|``; infinity where either is not finite.
    """
    random = np.random.default_rng(0)
    shape = (1, _CHANNELS, 1, 16)

    def draw(_: int = 0) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape)).to(dtype)

    loop = SchedulerLoop(prepared, request)
    x = start = draw() * plan.initial_scale
    outputs, noise, inputs, latents = [], [], [], []
    for k in range(len(loop.timesteps)):
        drawn: list[Tensor] = []

        def keep(_: int, drawn: list[Tensor] = drawn) -> Tensor:
            drawn.append(draw())
            return drawn[-1].clone()

        outputs.append(draw())
        noise.append(drawn)
        tape = ProbeTape(shape, keep)
        loop.use_noise(tape.noise)
        with tape if plan.noise_columns or dtype == torch.float64 else nullcontext():
            inputs.append(loop.model_input(k, x.clone()).clone())
            x = loop.step(k, outputs[k].clone(), x.clone())
        latents.append(x.clone())

    calls = iter(range(len(plan)))
    errors = []

    def model(model_input: Tensor, t: float) -> Tensor:
        k = next(calls)
        errors.append(_distance(model_input, inputs[k]))
        return outputs[k]

    plan.run(
        model,
        start,
        noise=lambda k, j: noise[k][j] if j < len(noise[k]) else torch.zeros_like(start),
        callback=lambda k, x: errors.append(_distance(x, latents[k])),
    )
    return max(errors)


def _distance(value: Tensor, truth: Tensor) -> float:
    error, scale = float((value - truth).abs().max()), float(truth.abs().max())
    return error / (scale or 1.0) if np.isfinite([error, scale]).all() else float("inf")
