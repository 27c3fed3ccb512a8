"""`Plan.from_scheduler` against every scheduler of the installed diffusers, by class.

The configurations are in scheduler_configs.json. Each is run here as its pipeline would run it,
by a loop that shares nothing with the compiler: noise comes from torch's own generator, so a plan
must also ask for as many draws as the scheduler takes, at the same steps.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from sidestep.runtime.plan import Plan

CONFIGS = json.loads((Path(__file__).parent / "scheduler_configs.json").read_text())
LINEAR, REFUSED = CONFIGS["linear"], CONFIGS["refused"]
# What JSON cannot say.
INIT = {"SASolver tau=0": {"tau_func": lambda t: 0.0}}
STEP = {"RFD4Proteina": {"emit_mask": torch.ones(1, 1, dtype=torch.bool)}}
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Sigma falls from 4096 to 22 in the first step, and the scheduler subtracts the two in float32: it
# loses eight bits of its own result. Against the float64 step the plan is as good as any other.
CANCELS = {"Euler v_pred trailing zsnr"}
SHAPE = (1, 4, 3, 7)


def _classes() -> dict[str, type]:
    found = {}
    for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and issubclass(value, SchedulerMixin):
                found[name] = value
    del found["SchedulerMixin"]
    return found


CLASSES = _classes()


BY_NAME = {config["name"]: config for config in LINEAR + REFUSED}


@functools.cache
def _made(name: str) -> Any:
    config = BY_NAME[name]
    cls = CLASSES[config["class"]]
    accepted = inspect.signature(cls.__init__).parameters
    init = STABLE_DIFFUSION if "beta_schedule" in accepted else {}
    if config["class"] == "UnCLIPScheduler":
        init = {}
    return cls(**init, **config.get("init", {}), **INIT.get(name, {}))


def _make(config: dict[str, Any]) -> Any:
    """A scheduler of its own; some take a second to construct."""
    return copy.deepcopy(_made(config["name"]))


def _compile(config: dict[str, Any], scheduler: Any = None) -> Plan:
    return Plan.from_scheduler(
        _make(config) if scheduler is None else scheduler,
        config.get("steps", 12),
        set_timesteps=config.get("set_timesteps"),
        step={**config.get("step", {}), **STEP.get(config["name"], {})},
        method=config.get("method", "step"),
        begin_index=config.get("begin", 0),
    )


class Wide(Tensor):
    """A float64 tensor that no cast narrows: a scheduler's own coefficients stay what they are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = super().__torch_function__(func, types, args, kwargs or {})
        narrowed = isinstance(result, Wide) and result.dtype == torch.float32
        return args[0] if narrowed and func in (Tensor.to, Tensor.float) else result


def _pipeline_loop(
    config: dict[str, Any], x: Tensor, outputs: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(model input, latent) of every step, as the class's own pipeline calls the scheduler."""
    scheduler, name = _make(config), config["class"]
    grid = config.get("set_timesteps", {})
    if not grid.keys() & {"sigmas", "timesteps"}:
        grid = {"num_inference_steps": config.get("steps", 12), **grid}
    scheduler.set_timesteps(**grid)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(config.get("steps", 12))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(config.get("begin", 0))
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = lambda *_: torch.randn(SHAPE, dtype=outputs.dtype)
    timesteps = scheduler.timesteps
    lists_end = name in ("DDPMWuerstchenScheduler", "SCMScheduler")
    if lists_end or (name == "LTXEulerAncestralRFScheduler" and "sigmas" in grid):
        timesteps = timesteps[:-1]
    timesteps = timesteps[config.get("begin", 0) :]
    step: Callable[..., Any] = getattr(scheduler, config.get("method", "step"))
    extra = {**config.get("step", {}), **STEP.get(config["name"], {})}
    old = None
    for k, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if name == "CogVideoXDPMScheduler":
            x, old = step(outputs[k], old, t, timesteps[k - 1] if k else None, x)
        elif name == "ScoreSdeVpScheduler":
            x = step(outputs[k], x, t)[0]
        elif name == "DDPMWuerstchenScheduler":
            x = step(outputs[k], t.expand(1), x).prev_sample
        else:
            x = step(outputs[k], t, x, **extra).prev_sample
        yield scaled, x


def _trajectories(
    config: dict[str, Any], plan: Plan, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """Model inputs and latents of every step: the scheduler's and the plan's, in float64."""
    random = np.random.default_rng(7)
    start = np.float32(random.standard_normal(SHAPE) * plan.initial_scale)
    x = torch.tensor(start, dtype=dtype)
    outputs = torch.tensor(np.float32(random.standard_normal((len(plan), *SHAPE))), dtype=dtype)
    draw = torch.randn
    torch.manual_seed(11)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *a, **k: draw(*a, **{**k, "dtype": dtype}))
        kind = Wide if dtype == torch.float64 else Tensor
        pairs = list(
            _pipeline_loop(config, x.clone().as_subclass(kind), outputs.clone().as_subclass(kind))
        )
    assert len(pairs) == len(plan)
    truth = [v.as_subclass(Tensor).double() for pair in pairs for v in pair]

    torch.manual_seed(11)
    drawn = [[torch.randn(SHAPE, dtype=dtype) for _ in range(n)] for n in plan.draws]
    values: list[Tensor] = []

    def model(scaled: Tensor, t: float) -> Tensor:
        values.append(scaled.double())
        return outputs[len(values) // 2]

    def noise(k: int, j: int) -> Tensor:
        return drawn[k][j] if j < len(drawn[k]) else torch.full(SHAPE, torch.nan, dtype=dtype)

    plan.run(model, x, noise, callback=lambda k, x: values.append(x.double()))
    return truth, values


def _error(values: list[Tensor], truth: list[Tensor]) -> float:
    pairs = zip(values, truth, strict=True)
    errors = [float((a - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in pairs]
    return max(errors) if np.isfinite(errors).all() else float("inf")


@pytest.mark.parametrize("config", LINEAR, ids=lambda c: c["name"])
def test_replays_the_scheduler(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if config["name"] in CANCELS else "error", UserWarning)
        plan = _compile(config)
    assert plan.registers == config["registers"]
    exact, wide = _trajectories(config, plan, torch.float64, monkeypatch)
    rounded, narrow = _trajectories(config, plan, torch.float32, monkeypatch)
    assert _error(wide, exact) < 1e-10
    if config["name"] in CANCELS:
        assert _error(narrow, exact) < 1e-6 < _error(rounded, exact)
    else:
        assert _error(narrow, rounded) < 1e-5


@pytest.mark.parametrize("config", REFUSED, ids=lambda c: c["name"])
def test_what_cannot_be_compiled_names_the_setting_to_change(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        _compile(config)
    assert config["message"] in str(caught.value)
    assert str(caught.value).startswith("Plan.from_scheduler: ")
    assert "\n" not in str(caught.value)


def test_every_scheduler_class_is_compiled_or_refused() -> None:
    assert {c["class"] for c in LINEAR + REFUSED} == set(CLASSES)
    assert len(BY_NAME) == len(LINEAR) + len(REFUSED)


# -- what a compiled plan says -----------------------------------------------------------------


def test_ddim_is_the_formula_of_the_paper() -> None:
    """x' = sqrt(a') x0 + sqrt(1 - a') u with x0 = (x - sqrt(1 - a) u) / sqrt(a): DDIM, eq. 12."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **STABLE_DIFFUSION)
    plan = Plan.from_scheduler(scheduler, 10)
    a = scheduler.alphas_cumprod.double().numpy()[np.arange(900, -1, -100)]
    after = np.append(a[1:], 1.0)
    x = np.sqrt(after / a)
    u = np.sqrt(1 - after) - x * np.sqrt(1 - a)
    np.testing.assert_allclose(plan.matrices[:, 0], np.stack([x, u], axis=1), atol=2e-7)
    np.testing.assert_array_equal(plan.timesteps, np.arange(900, -1, -100))
    np.testing.assert_allclose(plan.log_snr, 0.5 * np.log(a / (1 - a)), rtol=1e-12)
    assert plan.name == "DDIM" and plan.initial_scale == 1.0 and not plan.stochastic


def test_euler_scales_the_model_input_and_the_noise() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION)
    plan = Plan.from_scheduler(scheduler, 10)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double().numpy()
    np.testing.assert_allclose(plan.input_scales, (sigmas[:-1] ** 2 + 1) ** -0.5, rtol=1e-6)
    np.testing.assert_allclose(plan.log_snr, -np.log(sigmas[:-1]), rtol=1e-12)
    np.testing.assert_allclose(plan.matrices[:, 0, 1], np.diff(sigmas), rtol=1e-6)
    assert plan.initial_scale == pytest.approx(float(scheduler.init_noise_sigma))


def test_flow_matching_log_snr_starts_at_pure_noise() -> None:
    plan = Plan.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), 4)
    sigma = plan.timesteps[1:] / 1000
    assert plan.log_snr is not None and plan.log_snr[0] == -np.inf
    np.testing.assert_allclose(plan.log_snr[1:], np.log((1 - sigma) / sigma), rtol=1e-6)


def test_log_snr_is_none_where_the_scheduler_does_not_say() -> None:
    assert Plan.from_scheduler(diffusers.IPNDMScheduler(), 4).log_snr is None


def test_a_late_start_is_a_slice_of_the_times_but_not_of_the_plan() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION)
    whole = Plan.from_scheduler(scheduler, 10)
    late = Plan.from_scheduler(scheduler, 10, begin_index=4)
    np.testing.assert_array_equal(late.timesteps, whole.timesteps[4:])
    np.testing.assert_array_equal(late.log_snr, whole.log_snr[4:])
    np.testing.assert_array_equal(late.matrices[1:], whole.matrices[5:])
    assert late.matrices[0, 0, 1] == 0 != whole.matrices[4, 0, 1]  # order 1 and order 2


def test_second_order_schedulers_call_the_model_twice_a_step() -> None:
    plan = Plan.from_scheduler(diffusers.HeunDiscreteScheduler(**STABLE_DIFFUSION), 10)
    assert len(plan) == 19


def test_draws_count_noise_that_is_never_used() -> None:
    """The last step of Euler Ancestral draws noise and multiplies it by zero."""
    plan = Plan.from_scheduler(diffusers.EulerAncestralDiscreteScheduler(**STABLE_DIFFUSION), 5)
    assert plan.draws.tolist() == [1] * 5
    assert (plan.matrices[:-1, 0, 2] > 0).all() and plan.matrices[-1, 0, 2] == 0
    cogvideo = diffusers.CogVideoXDPMScheduler(clip_sample=False)
    plan = Plan.from_scheduler(cogvideo, 5)
    assert plan.noise_columns == 2 and plan.draws.max() == 2
    assert all(plan.used_draw(k) in (None, 0, 1) for k in range(5))


def test_history_shift_of_a_third_order_solver_moves_nothing() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=3, **STABLE_DIFFUSION)
    plan = Plan.from_scheduler(scheduler, 20)
    written = (plan.matrices[:, 1:] != np.eye(3, 4)[None, 1:]).any(axis=2)
    assert plan.registers == 3 and written.sum(axis=1).max() == 1


def test_a_setting_of_another_class_does_not_matter() -> None:
    """`from_config` keeps what it does not know, as files on the Hub have it; nothing reads it."""
    config = {**STABLE_DIFFUSION, "clip_sample": True, "thresholding": True}
    scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    assert scheduler.config["clip_sample"] is True
    plain = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION)
    assert Plan.from_scheduler(scheduler, 8) == Plan.from_scheduler(plain, 8)


# -- what compiling leaves alone ----------------------------------------------------------------


def test_the_scheduler_and_the_random_state_are_not_touched() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    )
    before = {k: repr(v) for k, v in vars(scheduler).items()}
    random = torch.get_rng_state()
    Plan.from_scheduler(scheduler, 8, set_timesteps={"mu": 0.8, "device": "cpu"})
    assert {k: repr(v) for k, v in vars(scheduler).items()} == before
    assert scheduler.config.flow_shift == 1.0
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.filterwarnings("ignore:Should have tb<=t1")  # torchsde, of float32 sigmas
@pytest.mark.parametrize(
    "name", ["DPM++ 3M n20", "UniPC-2 bh2", "DPM++ 2S", "SASolver", "PNDM (with PRK)", "LMS order4",
             "Heun", "IPNDM", "DPMSolverSDE", "CosineDPM++ (StableAudio)"],
)  # fmt: skip
def test_a_scheduler_in_use_compiles_to_the_same_plan(name: str) -> None:
    config = next(c for c in LINEAR if c["name"] == name)
    used = _make(config)
    used.set_timesteps(9)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    for t in used.timesteps[:4]:
        x = used.step(torch.tanh(x), t, used.scale_model_input(x, t)).prev_sample
    assert _compile(config, used) == _compile(config)
