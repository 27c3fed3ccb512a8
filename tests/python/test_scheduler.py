"""`SidestepScheduler` in a diffusers loop, against the plan that it runs."""

from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from sidestep import SidestepScheduler
from sidestep.metrics import psnr
from sidestep.models import load_pipeline
from sidestep.runtime.grids import find_grid
from sidestep.runtime.solvers import DEFAULT_GRID, DEFAULT_SOLVER, find_solver

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _model(x: torch.Tensor, t: float) -> torch.Tensor:
    return 0.7 * x + torch.sin(3 * x + float(t) / 300)


def _loop(scheduler: SidestepScheduler, x: torch.Tensor, **step: object) -> torch.Tensor:
    """What a pipeline does."""
    for t in scheduler.timesteps:
        u = _model(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(u, t, x, **step).prev_sample
    return x


@pytest.mark.parametrize(
    ("solver", "grid"),
    [("ddim", "leading"), ("euler", "trailing"), ("dpmsolver++2m", "karras"),
     ("dpmsolver++3m", "lu"), ("dpmsolver++2s", "logsnr"), ("unipc3", "karras"),
     ("ipndm", "karras"), ("heun", "linspace")],
)  # fmt: skip
def test_the_loop_is_the_plan(solver: str, grid: str) -> None:
    scheduler = SidestepScheduler(**SD, solver=solver, grid=grid)
    scheduler.set_timesteps(11)
    plan = find_solver(solver).plan(scheduler.schedule, find_grid(grid), 11)
    noise = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(1))
    assert scheduler.init_noise_sigma == plan.initial_scale
    x = noise * scheduler.init_noise_sigma
    assert [float(t) for t in scheduler.timesteps] == pytest.approx(plan.timesteps.tolist())
    result = _loop(scheduler, x)
    assert torch.allclose(result, plan.run(_model, x), rtol=0, atol=1e-6)


def test_noise_comes_from_the_generator_in_order() -> None:
    scheduler = SidestepScheduler(**SD, solver="sde-dpmsolver++2m")
    scheduler.set_timesteps(6)
    plan = find_solver("sde-dpmsolver++2m").plan(scheduler.schedule, find_grid(DEFAULT_GRID), 6)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    result = _loop(scheduler, x, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    tape = torch.stack([torch.randn(1, 2, 4, 4, 4, generator=generator) for _ in range(6)])
    assert torch.allclose(result, plan.run(_model, x, noise=tape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state_is_fp32_under_half_precision(dtype: torch.dtype) -> None:
    scheduler = SidestepScheduler(**SD)
    scheduler.set_timesteps(20)
    plan = find_solver(DEFAULT_SOLVER).plan(scheduler.schedule, find_grid(DEFAULT_GRID), 20)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(k)).to(dtype)
        for k in range(20)
    ]
    result = x
    for u, t in zip(outputs, scheduler.timesteps, strict=True):
        result = scheduler.step(u, t, result, return_dict=False)[0]
    assert result.dtype == dtype
    iterator = iter(outputs)
    expected = plan.run(lambda _x, _t: next(iterator).float(), x.float())
    assert torch.equal(result, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_is_no_matter(dtype: torch.dtype) -> None:
    def result() -> torch.Tensor:
        scheduler = SidestepScheduler(**SD, solver="sde-dpmsolver++2m")
        scheduler.set_timesteps(5)
        return _loop(scheduler, x, generator=torch.Generator().manual_seed(2))

    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    expected = result()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(result(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_latents_changed_between_steps_are_taken_up() -> None:
    scheduler = SidestepScheduler(**SD)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for in_place in (True, False):
        scheduler.set_timesteps(4)
        latents = x
        for k, t in enumerate(scheduler.timesteps):
            latents = scheduler.step(_model(latents, t), t, latents).prev_sample
            if k == 1:
                latents = latents.mul_(0.5) if in_place else latents * 0.5
        results.append(latents)
    untouched = SidestepScheduler(**SD)
    untouched.set_timesteps(4)
    assert torch.equal(*results)
    assert not torch.allclose(results[0], _loop(untouched, x))


def test_step_sizes_are_the_kernels() -> None:
    scheduler = SidestepScheduler(**SD)
    scheduler.set_timesteps(3)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert scheduler.step_sizes is None
    after = scheduler.step(_model(x, 0), scheduler.timesteps[0], x).prev_sample
    assert torch.allclose(scheduler.step_sizes, (after - x).abs().flatten(1).mean(1), rtol=1e-5)
    assert scheduler.step_index == 1


def test_a_run_may_begin_in_the_middle() -> None:
    scheduler = SidestepScheduler(**SD)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for tell in (True, False):
        scheduler.set_timesteps(8)
        if tell:
            scheduler.set_begin_index(5)
        latents = x
        for t in scheduler.timesteps[5:]:
            latents = scheduler.step(_model(latents, t), t, latents).prev_sample
        results.append(latents)
    plan = find_solver(DEFAULT_SOLVER).plan(scheduler.schedule, find_grid(DEFAULT_GRID), 8, begin=5)
    assert torch.equal(*results)
    assert torch.allclose(results[0].double(), plan.run(_model, x.double()), atol=1e-5)


def test_add_noise_is_the_forward_process() -> None:
    own = DDIMScheduler(**SD, clip_sample=False)
    x0, noise = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    scheduler = SidestepScheduler(**SD, solver="ddim", grid="trailing")
    timesteps = torch.tensor([989.0, 299.0])
    ours = scheduler.add_noise(x0, noise, timesteps)
    theirs = own.add_noise(x0, noise, timesteps.round().long())
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_config_round_trip_keeps_names() -> None:
    own = DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction")
    ours = SidestepScheduler.from_config(own.config, solver="unipc2", grid="lu")
    assert (ours.config.solver, ours.config.grid) == ("unipc2", "lu")
    assert ours.config.prediction_type == "v_prediction"
    again = SidestepScheduler.from_config(ours.config)
    assert dict(again.config) == dict(ours.config)
    back = DDIMScheduler.from_config(ours.config)
    assert (back.config.prediction_type, back.config.beta_end) == ("v_prediction", 0.012)


def test_a_flow_is_recognised() -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = SidestepScheduler.from_config(own.config, solver="ddim", grid="trailing")
    ours.set_timesteps(5)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    times = np.linspace(1, 0, 6)
    sigmas = 3 * times / (1 + 2 * times)
    expected = x.double()
    for s, t in pairwise(sigmas):
        expected = expected + (t - s) * _model(expected, 1000 * s)
    assert ours.timesteps.tolist() == pytest.approx((1000 * sigmas[:-1]).tolist(), abs=1e-3)
    assert torch.allclose(_loop(ours, x).double(), expected, atol=1e-4)
    with pytest.raises(ValueError, match="use_dynamic_shifting is True"):
        SidestepScheduler.from_config({**own.config, "use_dynamic_shifting": True})


def test_errors_are_one_sentence() -> None:
    x = torch.zeros(1, 4, 4, 4)
    fresh, scheduler = SidestepScheduler(**SD), SidestepScheduler(**SD)
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match=r"model_output has shape \[2, 4, 4, 4\]"):
        scheduler.step(torch.zeros(2, 4, 4, 4), scheduler.timesteps[0], x)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="all 1 steps are done"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="solver 'magic' is unknown"):
        SidestepScheduler(solver="magic")
    for method in (fresh.step, fresh.scale_model_input):
        with pytest.raises(ValueError, match="expected a call of set_timesteps before it"):
            method(x, 0, x) if method == fresh.step else method(x, 0)
    with pytest.raises(ValueError, match="scale_model_input: all 1 steps are done"):
        scheduler.scale_model_input(x, scheduler.timesteps[0])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"thresholding": True}, "thresholding is True"),
        ({"beta_schedule": "linear", "use_dynamic_shifting": True}, "use_dynamic_shifting is True"),
        ({"shift": 3.0, "shift_terminal": 0.1}, "shift_terminal is 0.1"),
        ({"beta_schedule": "linear", "timestep_type": "continuous"}, "timestep_type is"),
        (diffusers.EDMEulerScheduler().config, "sigma_data is 0.5"),
        (diffusers.LTXEulerAncestralRFScheduler().config, "neither beta_schedule nor shift"),
        (diffusers.ScoreSdeVeScheduler().config, "neither beta_schedule nor shift"),
    ],
)
def test_configs_it_cannot_stand_for_are_refused(config: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SidestepScheduler.from_config(config)


def test_it_runs_in_inference_mode() -> None:
    scheduler = SidestepScheduler(**SD)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for context in (torch.inference_mode, torch.no_grad):
        scheduler.set_timesteps(5)
        with context():
            results.append(_loop(scheduler, x).clone())
    assert torch.equal(*results)


def test_a_flow_keeps_its_shift_and_its_even_times() -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = SidestepScheduler.from_config(own.config)
    ours.set_timesteps(4)
    times = np.array([1, 0.75, 0.5, 0.25])
    expected = 1000 * 3 * times / (1 + 2 * times)
    assert ours.timesteps.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert FlowMatchEulerDiscreteScheduler.from_config(ours.config).config.shift == 3.0
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    noisy = ours.add_noise(x0, noise, torch.tensor([600.0]))
    assert torch.allclose(noisy, 0.4 * x0 + 0.6 * noise, atol=1e-5)


def test_an_empty_batch_steps() -> None:
    scheduler = SidestepScheduler(**SD)
    scheduler.set_timesteps(2)
    x = torch.zeros(0, 4, 4, 4)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.shape == x.shape


def test_pipelines_take_it_unchanged() -> None:
    pipe = load_pipeline("emoji-sd")
    config = pipe.scheduler.config
    settings = {"num_inference_steps": 10, "output_type": "pt"}
    pictures = []
    for scheduler in (
        SidestepScheduler.from_config(config, solver="ddim", grid="trailing"),
        DDIMScheduler.from_config(config, timestep_spacing="trailing"),
    ):
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(3)
        pictures.append(pipe("hot dog", generator=generator, **settings).images)
    assert psnr(*pictures)[0] > 30  # they end at sigma = 0 and at the first timestep
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(
        **{**pipe.components, "scheduler": SidestepScheduler.from_config(config)},
        requires_safety_checker=False,
    )
    image_to_image.set_progress_bar_config(disable=True)
    changed = image_to_image(
        "taco", image=pictures[0], strength=0.4, generator=generator, **settings
    ).images
    assert image_to_image.scheduler.begin_index == 6
    assert 12 < psnr(changed, pictures[0])[0] < 40
