"""`SidestepScheduler`: a drop-in diffusers scheduler whose step is one fused kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from sidestep.adapters.configs import refuse
from sidestep.kernels import PreparedStep
from sidestep.runtime.grids import find_grid
from sidestep.runtime.plan import Plan
from sidestep.runtime.schedules import DiscreteVP, FlowMatching, Schedule
from sidestep.runtime.solvers import DEFAULT_FLOW_GRID, DEFAULT_GRID, DEFAULT_SOLVER, find_solver


class SidestepScheduler(SchedulerMixin, ConfigMixin):
    """Any solver and grid of ours, in place of a pipeline's own scheduler.

        pipe.scheduler = SidestepScheduler.from_config(pipe.scheduler.config)

    The latents are kept in fp32 between steps; conversion of the prediction, update, history and
    step sizes are one pass over memory (`sidestep::solver_step`).

    Args:
        num_train_timesteps: Timesteps the model was trained on.
        beta_start: First variance of the schedule.
        beta_end: Last variance.
        beta_schedule: linear, scaled_linear or squaredcos_cap_v2.
        trained_betas: The variances themselves.
        rescale_betas_zero_snr: Whether the last timestep holds no signal.
        prediction_type: epsilon, sample, v_prediction or flow_prediction.
        use_flow_sigmas: Whether the model was trained by flow matching.
        flow_shift: The static shift of a flow's time.
        solver: A name of `sidestep.runtime.solvers.SOLVERS`.
        grid: A name of `sidestep.runtime.grids.GRIDS`; None for the default, which for a flow is
            even in shifted time, as the model was trained.
        shift: What a ``FlowMatch...`` config calls ``flow_shift``; kept for the way back.

    Raises:
        ValueError: A name is unknown, or the settings contradict each other.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        solver: str = DEFAULT_SOLVER,
        grid: str | None = None,
        shift: float | None = None,
    ) -> None:
        self.schedule = _schedule(self.config)
        flow = isinstance(self.schedule, FlowMatching)
        self._solver = find_solver(solver)
        self._grid = find_grid(grid or (DEFAULT_FLOW_GRID if flow else DEFAULT_GRID))
        self.num_inference_steps: int | None = None
        self.timesteps = torch.from_numpy(np.arange(num_train_timesteps)[::-1].copy())
        self.init_noise_sigma = 1.0
        self._plan: Plan | None = None
        self._begin: int | None = None
        self._state: _State | None = None

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As in diffusers; a config with a ``shift`` and no betas (FlowMatch...) is a flow."""
        config = dict(config or {})
        flow = "shift" in config and not {"beta_schedule", "trained_betas"} & set(config)
        refuse(config, flow)
        if flow:
            kwargs = {
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "flow_shift": config["shift"],
                **kwargs,
            }
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # -- the scheduler contract of diffusers --------------------------------------------------

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Begins a generation of ``num_inference_steps`` model calls.

        Raises:
            ValueError: The solver or grid cannot make so many.
        """
        plan = self._compile(num_inference_steps, 0)
        self._plan, self._steps_asked = plan, num_inference_steps
        self.num_inference_steps = len(plan)
        self.timesteps = torch.tensor(plan.timesteps, dtype=torch.float32, device=device)
        self.init_noise_sigma = plan.initial_scale
        self._begin, self._state = None, None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The step at which an image-to-image run begins."""
        self._begin = begin_index

    @property
    def begin_index(self) -> int | None:
        """The step at which the run begins, once it is known."""
        return self._begin

    @property
    def step_index(self) -> int | None:
        """The next step, counted over all timesteps; None before the first."""
        return None if self._state is None else (self._begin or 0) + self._state.step

    @property
    def step_sizes(self) -> Tensor | None:
        """``[B]`` fp32 ``mean |x' - x|`` of the last step, as the kernel formed it."""
        return None if self._state is None else self._state.fused.stats[:, 0]

    @property
    def log_snr(self) -> np.ndarray | None:
        """``lambda = ln(alpha / sigma)`` at every timestep; None before ``set_timesteps``."""
        return None if self._plan is None else self._plan.log_snr

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The model's input: ``sample`` times the scale of this step.

        Raises:
            ValueError: ``set_timesteps`` was not called, or all steps are done.
        """
        plan, index = self._plan_of("scale_model_input"), self._index_of(timestep)
        if self._state is not None:
            plan, index = self._state.plan, self._state.next_step("scale_model_input")
        scale = float(plan.input_scales[index])
        return sample if scale == 1 else sample * scale

    def step(
        self,
        model_output: Tensor,  # [B, ...]
        timestep: float | Tensor,
        sample: Tensor,  # [B, ...]
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One solver step, ``[B, ...]`` to ``[B, ...]``.

        Raises:
            ValueError: ``set_timesteps`` was not called, all steps are done, or shapes disagree.
        """
        self._plan_of("step")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"SidestepScheduler.step: model_output has shape {list(model_output.shape)}, "
                f"expected {list(sample.shape)} as sample"
            )
        if self._state is None:
            if self._begin is None:
                self._begin = self._index_of(timestep)
            self._state = _State.start(self.plan(self._begin), sample)
        state = self._state
        state.next_step("step")
        noise = state.draw(generator)
        prev_sample = state.advance(model_output, sample, noise)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha(t) x_0 + sigma(t) eps`` at ``[B]`` model times, in the solver's coordinates."""
        config: Any = self.config
        times = timesteps.reshape(-1).double().cpu().numpy()
        if isinstance(self.schedule, FlowMatching):
            times = self.schedule.t_from_noise_level(times / self.schedule.time_scale)
        else:
            times = (times + 1) / config.num_train_timesteps
        points = [self._solver.point(self.schedule, float(t)) for t in times]
        shape = (-1, *[1] * (original_samples.dim() - 1))
        alpha = torch.tensor([p.alpha for p in points]).to(original_samples).view(shape)
        sigma = torch.tensor([p.sigma for p in points]).to(original_samples).view(shape)
        return alpha * original_samples + sigma * noise

    def plan(self, begin: int = 0) -> Plan:
        """What the steps from ``begin`` on do.

        Raises:
            ValueError: ``set_timesteps`` was not called.
        """
        full = self._plan_of("plan")
        return full if begin == 0 else self._compile(self._steps_asked, begin)

    def __len__(self) -> int:
        config: Any = self.config
        return int(config.num_train_timesteps)

    def _plan_of(self, method: str) -> Plan:
        if self._plan is None:
            raise ValueError(
                f"SidestepScheduler.{method}: expected a call of set_timesteps before it"
            )
        return self._plan

    def _index_of(self, timestep: float | Tensor | None) -> int:
        """The step whose timestep is nearest; 0 where none is given."""
        if timestep is None:
            return 0
        times = self._plan_of("step").timesteps
        return int(np.abs(times - float(timestep)).argmin())

    def _compile(self, steps: int, begin: int) -> Plan:
        config: Any = self.config
        return self._solver.plan(
            self.schedule, self._grid, steps, prediction=config.prediction_type, begin=begin
        )


@dataclass
class _State:
    """One generation: the fused step with its fp32 registers, and where we are."""

    plan: Plan
    fused: PreparedStep
    shape: torch.Size
    step: int = 0
    last: Tensor | None = None  # what the last step returned
    version: float = math.nan

    @staticmethod
    def start(plan: Plan, sample: Tensor) -> _State:
        device, rows = sample.device, sample.shape[0]
        table = plan.table(device)
        table[:, -1] = 1.0  # the pipeline scales the model's input itself
        size = sample.shape[1:].numel()
        return _State(
            plan=plan,
            fused=PreparedStep(
                registers=torch.zeros(
                    rows, plan.registers, size, dtype=torch.float32, device=device
                ),
                weights=torch.ones(rows, 1, dtype=torch.float32, device=device),
                table=table,
                step=torch.zeros(rows, dtype=torch.int64, device=device),
                slot=None,
                stats=torch.zeros(rows, 2, dtype=torch.float32, device=device),
            ),
            shape=sample.shape,
        )

    def next_step(self, method: str) -> int:
        """The index of the step to come."""
        if self.step >= len(self.plan):
            raise ValueError(
                f"SidestepScheduler.{method}: all {len(self.plan)} steps are done, expected "
                "set_timesteps before the next generation"
            )
        return self.step

    def draw(self, generator: torch.Generator | list[torch.Generator] | None) -> Tensor | None:
        """The draw this step uses, ``[B, D]`` fp32, in the order and number of the plan."""
        from diffusers.utils.torch_utils import randn_tensor

        used = self.plan.used_draw(self.step)
        noise = None
        for j in range(int(np.asarray(self.plan.draws)[self.step])):
            drawn = randn_tensor(
                tuple(self.shape),
                generator=generator,
                device=self.fused.registers.device,
                dtype=torch.float32,
            )
            noise = drawn.flatten(1) if j == used else noise
        return noise

    def advance(self, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
        """Takes the step; a ``sample`` that is not what the last step returned replaces x."""
        if sample is not self.last or _version(sample) != self.version:
            self.fused.registers[:, 0] = sample.flatten(1)
        output = model_output.to(sample.dtype).contiguous()
        result = torch.empty_like(output)
        self.fused.step.fill_(self.step)
        self.fused(output, noise, model_input=result)
        self.step += 1
        self.last = result
        self.version = _version(result)
        return self.last


def _version(tensor: Tensor) -> float:
    """How often a tensor was written to; never equal where torch does not count."""
    return math.nan if tensor.is_inference() else tensor._version


def _schedule(config: Any) -> Schedule:
    if config.use_flow_sigmas or config.prediction_type == "flow_prediction":
        return FlowMatching(shift=config.flow_shift, time_scale=config.num_train_timesteps)
    return DiscreteVP.from_config(config)
