"""`SidestepScheduler`: a drop-in diffusers scheduler whose step is one fused kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from sidestep.kernels import PreparedStep
from sidestep.runtime.grids import find_grid
from sidestep.runtime.plan import Plan
from sidestep.runtime.schedules import DiscreteVP, FlowMatching, Schedule
from sidestep.runtime.solvers import DEFAULT_GRID, DEFAULT_SOLVER, find_solver


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
        grid: A name of `sidestep.runtime.grids.GRIDS`.

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
        grid: str = DEFAULT_GRID,
    ) -> None:
        self._solver, self._grid = find_solver(solver), find_grid(grid)
        self.schedule = _schedule(self.config)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.from_numpy(np.arange(num_train_timesteps)[::-1].copy())
        self.init_noise_sigma = 1.0
        self._begin: int | None = None
        self._state: _State | None = None

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As in diffusers; a config with a ``shift`` and no betas (FlowMatch...) is a flow."""
        config = {} if config is None else config
        if config.get("thresholding"):
            raise ValueError(
                "SidestepScheduler: thresholding is True in the config, expected False; "
                "Plan.run with a DynamicThreshold does it on the reference path"
            )
        if "shift" in config and "beta_schedule" not in config:
            if config.get("use_dynamic_shifting"):
                raise ValueError(
                    "SidestepScheduler: use_dynamic_shifting is True in the config, expected "
                    "False with a fixed flow_shift"
                )
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
            kwargs = {**flow, "flow_shift": config["shift"], **kwargs}
            config = {key: value for key, value in config.items() if key != "shift"}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # -- the scheduler contract of diffusers --------------------------------------------------

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Begins a generation of ``num_inference_steps`` model calls.

        Raises:
            ValueError: The solver or grid cannot make so many.
        """
        self._steps_asked = num_inference_steps
        self._plan = self._compile(0)
        self.num_inference_steps = len(self._plan)
        self.timesteps = torch.tensor(self._plan.timesteps, dtype=torch.float32, device=device)
        self.init_noise_sigma = self._plan.initial_scale
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

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The model's input: ``sample`` times the scale of this step."""
        index = self._index_of(timestep) if self._state is None else self._state.step
        plan = self._plan if self._state is None else self._state.plan
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
        if self.num_inference_steps is None:
            raise ValueError("SidestepScheduler.step: expected a call of set_timesteps before it")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"SidestepScheduler.step: model_output has shape {list(model_output.shape)}, "
                f"expected {list(sample.shape)} as sample"
            )
        if self._state is None:
            if self._begin is None:
                self._begin = self._index_of(timestep)
            plan = self._plan if self._begin == 0 else self._compile(self._begin)
            self._state = _State.start(plan, sample)
        state = self._state
        if state.step >= len(state.plan):
            raise ValueError(
                f"SidestepScheduler.step: all {len(state.plan)} steps are done, expected "
                "set_timesteps before the next generation"
            )
        noise = state.draw(generator)
        prev_sample = state.advance(model_output, sample, noise)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha(t) x_0 + sigma(t) eps`` at ``[B]`` timesteps, in the solver's coordinates."""
        indices = [self._index_of(t) for t in timesteps.reshape(-1)]
        log_snr = self._plan.log_snr
        assert log_snr is not None  # every solver of ours knows it
        times = self.schedule.t_from_log_snr(log_snr[indices])
        points = [self._solver.point(self.schedule, float(t)) for t in times]
        shape = (-1, *[1] * (original_samples.dim() - 1))
        alpha = torch.tensor([p.alpha for p in points]).to(original_samples).view(shape)
        sigma = torch.tensor([p.sigma for p in points]).to(original_samples).view(shape)
        return alpha * original_samples + sigma * noise

    def __len__(self) -> int:
        config: Any = self.config
        return int(config.num_train_timesteps)

    def _index_of(self, timestep: float | Tensor | None) -> int:
        """The step whose timestep is nearest; 0 where none is given."""
        if timestep is None:
            return 0
        return int(np.abs(self._plan.timesteps - float(timestep)).argmin())

    def _compile(self, begin: int) -> Plan:
        config: Any = self.config
        return self._solver.plan(
            self.schedule,
            self._grid,
            self._steps_asked,
            prediction=config.prediction_type,
            begin=begin,
        )


@dataclass
class _State:
    """One generation: the fused step with its fp32 registers, and where we are."""

    plan: Plan
    fused: PreparedStep
    shape: torch.Size
    step: int = 0
    last: Tensor | None = None  # what the last step returned
    version: int = 0

    @staticmethod
    def start(plan: Plan, sample: Tensor) -> _State:
        device, rows = sample.device, sample.shape[0]
        table = plan.table(device)
        table[:, -1] = 1.0  # the pipeline scales the model's input itself
        size = sample.shape[1:].numel()
        return _State(
            plan=plan,
            fused=PreparedStep(
                registers=torch.zeros(rows, plan.registers, size, device=device),
                weights=torch.ones(rows, 1, device=device),
                table=table,
                step=torch.zeros(rows, dtype=torch.int64, device=device),
                slot=None,
                stats=torch.zeros(rows, 2, device=device),
            ),
            shape=sample.shape,
        )

    def draw(self, generator: torch.Generator | list[torch.Generator] | None) -> Tensor | None:
        """The draw this step uses, ``[B, D]`` fp32, in the order and number of the plan."""
        from diffusers.utils.torch_utils import randn_tensor

        used = self.plan.used_draw(self.step)
        noise = None
        for j in range(int(np.asarray(self.plan.draws)[self.step])):
            drawn = randn_tensor(
                tuple(self.shape), generator=generator, device=self.fused.registers.device
            )
            noise = drawn.flatten(1) if j == used else noise
        return noise

    def advance(self, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> Tensor:
        """Takes the step; a ``sample`` that is not what the last step returned replaces x."""
        untouched = self.last is not None and sample is self.last
        if not (untouched and sample._version == self.version):
            self.fused.registers[:, 0] = sample.flatten(1)
        output = model_output.to(sample.dtype).contiguous()
        result = torch.empty_like(output)
        self.fused.step.fill_(self.step)
        self.fused(output, noise, model_input=result)
        self.step += 1
        self.last = result
        self.version = self.last._version
        return self.last


def _schedule(config: Any) -> Schedule:
    if config.use_flow_sigmas or config.prediction_type == "flow_prediction":
        return FlowMatching(shift=config.flow_shift, time_scale=config.num_train_timesteps)
    return DiscreteVP.from_config(config)
