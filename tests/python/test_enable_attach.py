"""`enable` comes and goes: attaching, detaching, copies, hooks, replaced parts, and refusals."""

import copy
import inspect
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny_pipelines import ALWAYS, NEVER, PATTERN, CountRows, generate, marks, tiny_unet
from torch import Tensor

from sidestep.adapters.enable import disable, enable
from sidestep.adapters.scheduler import SidestepScheduler

# -- attaching and detaching --------------------------------------------------------------------


def state_of(obj: Any) -> tuple[type, dict[str, Any]]:
    return type(obj), dict(vars(obj))


def test_disable_restores_exactly(pipe: Any) -> None:
    objects = [pipe, pipe.unet, pipe.scheduler]
    before = [state_of(obj) for obj in objects]
    handle = enable(pipe)
    for obj, (kind, attributes) in zip(objects, before, strict=True):
        assert isinstance(obj, kind) and type(obj) is not kind
        assert type(obj).__name__ == kind.__name__
        assert type(obj).__module__ == kind.__module__
        assert vars(obj) == attributes
    disable(pipe)
    handle.disable()
    for obj, (kind, attributes) in zip(objects, before, strict=True):
        assert type(obj) is kind and vars(obj) == attributes
    with pytest.raises(ValueError, match="not enabled"):
        disable(pipe)


def test_the_context_manager_disables_after_an_error(sd: StableDiffusionPipeline) -> None:
    with pytest.raises(ZeroDivisionError), enable(sd) as handle:
        raise ZeroDivisionError
    assert type(sd.unet) is diffusers.UNet2DConditionModel and not handle.active


def test_enabling_twice_is_an_error(sd: StableDiffusionPipeline) -> None:
    shared = diffusers.StableDiffusionImg2ImgPipeline(
        **sd.components, requires_safety_checker=False
    )
    with enable(sd):
        for other in (sd, shared):
            with pytest.raises(ValueError, match="is enabled already; disable it first"):
                enable(other)
        assert type(shared) is diffusers.StableDiffusionImg2ImgPipeline
    with enable(shared):
        pass


def test_signatures_and_configs_stay(sd: StableDiffusionPipeline, tmp_path: Path) -> None:
    before = [inspect.signature(f) for f in (sd.scheduler.step, sd.scheduler.set_timesteps)]
    with enable(sd):
        after = [inspect.signature(f) for f in (sd.scheduler.step, sd.scheduler.set_timesteps)]
        assert after == before
        assert inspect.signature(sd.__call__).parameters["guidance_scale"].default == 7.5
        sd.scheduler.save_pretrained(tmp_path)
        sd.unet.save_pretrained(tmp_path / "unet")
    assert DDIMScheduler.load_config(tmp_path)["_class_name"] == "DDIMScheduler"
    assert sd.unet.load_config(tmp_path / "unet")["_class_name"] == "UNet2DConditionModel"


def test_copies_and_pickles(sd: StableDiffusionPipeline) -> None:
    with enable(sd, ALWAYS) as handle:
        own = sd.scheduler
        expected = generate(sd, [1])
        sd.scheduler = copy.deepcopy(own)  # as pipelines with two schedulers do; it follows
        assert torch.equal(generate(sd, [1]), expected)
        assert marks(handle) == [PATTERN]
        for twin in (pickle.loads(pickle.dumps(own)), pickle.loads(pickle.dumps(sd.unet))):
            assert type(twin) in (DDIMScheduler, diffusers.UNet2DConditionModel)
        assert type(copy.deepcopy(sd.unet)) is diffusers.UNet2DConditionModel
        other = copy.deepcopy(sd)
        assert type(other) is StableDiffusionPipeline
        with enable(other, NEVER):
            generate(other, [1])
            assert torch.equal(generate(sd, [1]), expected)
    assert type(own) is DDIMScheduler and type(sd.scheduler) is DDIMScheduler


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_scheduler_steps_in_place_of_the_original(
    sd: StableDiffusionPipeline, copied: Any
) -> None:
    """LTX2 and others step a copy that the pipeline does not hold."""
    with enable(sd, ALWAYS) as handle, torch.no_grad():
        scheduler = copied(sd.scheduler)
        scheduler.set_timesteps(16)
        x = torch.randn(1, 4, 8, 8)
        for t in scheduler.timesteps:
            x = scheduler.step(sd.unet(x, t, torch.zeros(1, 7, 16)).sample, t, x).prev_sample
        assert marks(handle) == [PATTERN]
    scheduler.set_timesteps(2)  # goes on as a plain one
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.shape == x.shape


def test_a_scheduler_replaced_by_the_user(sd: StableDiffusionPipeline) -> None:
    own = sd.scheduler
    kinds = [diffusers.DPMSolverMultistepScheduler, DDIMScheduler]
    with enable(sd, ALWAYS) as handle:
        for kind in kinds:
            sd.scheduler = kind.from_config(sd.scheduler.config)
            generate(sd, [1, 2])
            assert marks(handle) == [PATTERN] * 2
        assert type(own) is DDIMScheduler  # let go
        sd.scheduler = type(sd.scheduler).from_config(sd.scheduler.config)
        generate(sd, [1])
        assert marks(handle) == [PATTERN]
    assert type(sd.scheduler) is DDIMScheduler


def test_a_scheduler_replaced_in_a_loop_of_ones_own(sd: StableDiffusionPipeline) -> None:
    counted = CountRows(sd)
    with enable(sd, ALWAYS) as handle, torch.no_grad():
        for _ in range(2):
            sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config)
            sd.scheduler.set_timesteps(16)  # not seen: the new scheduler is a plain one here
            x = torch.randn(1, 4, 8, 8)
            for t in sd.scheduler.timesteps:
                u = sd.unet(x, t, torch.zeros(1, 7, 16)).sample
                x = sd.scheduler.step(u, t, x).prev_sample
            assert marks(handle) == [PATTERN]
    assert len(counted.rows) == 2 * PATTERN.count("#")


def test_offload_hooks_come_and_go(sd: StableDiffusionPipeline) -> None:
    """accelerate puts its hook below ours or above it, and takes it away after every generation."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    with enable(sd, ALWAYS):
        expected = generate(sd, [1])
    cpu_offload_with_hook(sd.unet, "cpu")
    with enable(sd, ALWAYS) as handle:
        for _ in range(2):
            assert torch.equal(generate(sd, [1]), expected)
            assert marks(handle) == [PATTERN]
            remove_hook_from_module(sd.unet, recurse=True)
            sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config)
            assert torch.equal(generate(sd, [1]), expected)
            assert marks(handle) == [PATTERN]
            cpu_offload_with_hook(sd.unet, "cpu")
    assert torch.equal(generate(sd, [1]), generate(sd, [1]))


def test_a_replaced_model_is_taken_over(sd: StableDiffusionPipeline) -> None:
    own = sd.unet
    with enable(sd, ALWAYS) as handle:
        sd.unet = tiny_unet()
        sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config)  # both at once
        counted = CountRows(sd)
        generate(sd, [1])
        assert type(own) is diffusers.UNet2DConditionModel
        assert marks(handle) == [PATTERN] and len(counted.rows) == PATTERN.count("#")


def test_compiled_models(sd: StableDiffusionPipeline) -> None:
    """One graph, whether the model was compiled before or after `enable`."""

    class Net(torch.nn.Module):
        config, dtype, device = sd.unet.config, torch.float32, torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, sample: Tensor, t: Tensor, **_: Any) -> tuple[Tensor]:
            return (torch.tanh(sample) * self.scale,)

    def count(graph: Any, _example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for before in (True, False):
        graphs: list[Any] = []
        torch._dynamo.reset()
        net = Net()
        compiled = partial(torch.compile, backend=count)
        sd.unet = compiled(net) if before else net
        with enable(sd, ALWAYS) as handle:
            if not before:
                sd.unet = compiled(sd.unet)
            generate(sd, [1])
            generate(sd, [2])
            assert marks(handle) == [PATTERN]
        assert len(graphs) == 1, before


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings, reason",
    [
        ("HeunDiscreteScheduler", {}, "calls the model twice a step"),
        ("KDPM2DiscreteScheduler", {}, "calls the model twice a step"),
        ("EulerAncestralDiscreteScheduler", {}, "adds noise at every step"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "adds noise"),
        ("DDPMScheduler", {}, "adds noise"),
        ("LCMScheduler", {}, "adds noise"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "adds noise"),
    ],
)
def test_schedulers_that_cannot_be_judged_are_refused(
    sd: StableDiffusionPipeline, name: str, settings: dict[str, Any], reason: str
) -> None:
    unsuitable = getattr(diffusers, name).from_config(sd.scheduler.config, **settings)
    own, sd.scheduler = sd.scheduler, unsuitable
    with pytest.raises(ValueError, match=f"^enable: {name}.*{reason}"):
        enable(sd)
    assert type(sd) is StableDiffusionPipeline
    assert type(sd.unet) is diffusers.UNet2DConditionModel
    sd.scheduler = own
    with enable(sd):
        sd.scheduler = unsuitable
        with pytest.raises(ValueError, match=reason):
            generate(sd, [1])
        sd.scheduler = own
        generate(sd, [1], steps=4)


def test_our_own_noisy_solvers_are_refused(sd: StableDiffusionPipeline) -> None:
    config = sd.scheduler.config
    for solver in ("sde-dpmsolver++2m", "euler-ancestral", "heun"):
        sd.scheduler = SidestepScheduler.from_config(config, solver=solver)
        with pytest.raises(ValueError, match=f"^enable: SidestepScheduler \\({solver[:3]}"):
            enable(sd)
    # What a config carries along from another class does not count.
    sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    with enable(sd):
        generate(sd, [1], steps=2)


def test_noise_is_refused_at_the_step_that_draws_it(sd: StableDiffusionPipeline) -> None:
    with enable(sd):
        with pytest.raises(ValueError, match=r"DDIMScheduler\.step drew noise"):
            generate(sd, [1], eta=0.5)
        with pytest.raises(ValueError, match=r"DDIMScheduler\.step drew noise"):
            generate(sd, [1], eta=0.5, generator=None)
        generate(sd, [1], steps=2)
    generate(sd, [1], steps=2, eta=0.5)


def test_bad_arguments(sd: StableDiffusionPipeline) -> None:
    with pytest.raises(TypeError, match=r"expected settings .* sidestep.Adaptive\(\.\.\.\)"):
        enable(sd, "adaptive")  # type: ignore[arg-type]
    sd.unet = None
    with pytest.raises(ValueError, match="has none of unet, transformer"):
        enable(sd)
