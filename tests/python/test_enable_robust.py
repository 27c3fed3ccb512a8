"""`enable` beside what else people do to a pipeline: offload, copy, callbacks."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_cases import CASES, run
from tiny_methods import NEVER, ByRow, Pattern, marks
from tiny_pipelines import CountRows, generate
from torch import nn

from sidestep.adapters.attach import PARTS
from sidestep.adapters.enable import enable
from sidestep.runtime.methods.adaptive import Adaptive

HALF = Pattern("##..")

# -- the table ----------------------------------------------------------------------------------


def test_every_part_that_is_there_is_attached_to_and_let_go() -> None:
    for name in ("ControlNet", "Wan 2.2"):
        pipe = CASES[name].build()
        parts = [(part, getattr(pipe, part.name, None) if part.name else pipe) for part in PARTS]
        held = [(part, obj) for part, obj in parts if obj is not None]
        kinds = [type(obj) for _, obj in held]
        with enable(pipe, NEVER):
            assert all(type(obj) is not kind for (_, obj), kind in zip(held, kinds, strict=True))
        assert [type(obj) for _, obj in held] == kinds
    assert {part.role for part in PARTS} == {"pipeline", "model", "assistant", "scheduler"}


def test_controlnet_runs_only_where_the_model_does() -> None:
    case = CASES["ControlNet"]
    pipe = case.build()
    rows: dict[str, list[int]] = {"unet": [], "controlnet": []}
    for name, seen in rows.items():
        getattr(pipe, name).conv_in.register_forward_pre_hook(
            lambda _module, args, seen=seen: seen.append(len(args[0]))
        )
    for guess_mode in (False, True):
        with enable(pipe, ByRow()) as handle:
            run(case, pipe, [3, 1, 2], 8, guess_mode=guess_mode)
        called = [sum(row[k] for row in handle.summary().skip_map) for k in range(8)]
        assert 0 in called and any(0 < n < 3 for n in called)
        assert rows["unet"] == [2 * n for n in called if n]
        assert rows["controlnet"] == [(1 if guess_mode else 2) * n for n in called if n]
        for seen in rows.values():
            seen.clear()


def test_several_controlnets_are_one_assistant() -> None:
    case = CASES["ControlNet"]
    pipe = case.build()
    both = [pipe.controlnet, copy.deepcopy(pipe.controlnet)]
    pipe.controlnet = diffusers.MultiControlNetModel(both)
    image = case.inputs(pipe, [1, 2], True)["image"]
    settings = {"image": [image, image], "controlnet_conditioning_scale": [1.0, 0.5]}
    calls = []
    both[1].conv_in.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    plain = run(case, pipe, [1, 2], 8, **settings)
    calls.clear()
    with enable(pipe, NEVER):
        assert torch.equal(run(case, pipe, [1, 2], 8, **settings), plain)
    assert len(calls) == 8
    with enable(pipe, HALF):
        assert run(case, pipe, [1, 2], 8, **settings).isfinite().all()
    assert len(calls) == 8 + 4


def test_equal_noise_is_not_a_copy() -> None:
    """DiT steps the doubled batch; without guidance two classes may still share their noise."""
    case = CASES["DiT"]
    pipe = case.build()
    noise = [torch.Generator().manual_seed(5) for _ in range(2)]
    with enable(pipe, NEVER) as handle:
        run(case, pipe, [1, 2], 3, guided=False, generator=noise)
        assert len(handle.summary().nfe) == 2


# -- what belongs to the batch ------------------------------------------------------------------


def test_a_sequence_as_long_as_the_batch_is_not_taken_for_it() -> None:
    """Flux's ids are [sequence, 3]: three tokens of text and three pictures at once."""
    case = CASES["Flux"]
    pipe = case.build()
    prompts = [3, 1, 2]

    def tokens(embeds: dict[str, Any]) -> dict[str, Any]:
        return {k: v[:, :3] if k.endswith("prompt_embeds") and v.ndim == 3 else v
                for k, v in embeds.items()}  # fmt: skip

    with enable(pipe, ByRow()) as handle:
        together = run(case, pipe, prompts, 8, **tokens(case.inputs(pipe, prompts, True)))
        shown = marks(handle)
        assert len(set(shown)) > 1
        alone = run(case, pipe, [1], 8, **tokens(case.inputs(pipe, [1], True)))
        assert marks(handle) == [shown[1]]
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-4)


# -- offloading ---------------------------------------------------------------------------------


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe: Any) -> None:
    """What enable_sequential_cpu_offload does, which itself needs an accelerator to go to."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class OnDemand(ModelHook):
        execution_device = torch.device("cpu")

        def init_hook(self, module: nn.Module) -> nn.Module:
            self.weights = dict(module._parameters)
            return self.post_forward(module, module)

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            module._parameters.update(self.weights)
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            for name, weight in self.weights.items():
                on_meta = None if weight is None else nn.Parameter(weight.to("meta"))
                module._parameters[name] = on_meta
            return output

    for module in pipe.unet.modules():
        add_hook_to_module(module, OnDemand())


def group_offload(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(cpu, cpu, offload_type="leaf_level")


OFFLOADS = [model_offload, sequential_offload, group_offload]


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("first", ["enable", "offload"])
def test_offloading_before_and_after(
    sd: StableDiffusionPipeline, offload: Callable[[Any], None], first: str
) -> None:
    with enable(sd, HALF):
        expected = generate(sd, [1, 2], steps=8)
    if first == "offload":
        offload(sd)
    with enable(sd, HALF) as handle:
        if first == "enable":
            offload(sd)
        counted = CountRows(sd)
        for _ in range(2):  # accelerate renews its hooks after every call
            assert torch.equal(generate(sd, [1, 2], steps=8), expected)
            assert marks(handle) == ["##..##.."] * 2
        assert counted.rows == [4] * 8
    assert torch.equal(generate(sd, [1, 2], steps=4), generate(sd, [1, 2], steps=4))


def test_a_hook_below_ours_that_goes_does_not_take_ours_along(
    sd: StableDiffusionPipeline,
) -> None:
    """What `HookRegistry.remove_hook` does to a hook that was registered later."""
    from diffusers.hooks import HookRegistry, ModelHook

    registry = HookRegistry.check_if_exists_or_initialize(sd.unet)
    registry.register_hook(ModelHook(), "below")
    with enable(sd, HALF) as handle:
        registry.register_hook(ModelHook(), "above")
        registry.remove_hook("below")
        generate(sd, [1], steps=8)
        assert marks(handle) == ["##..##.."]


# -- copies -------------------------------------------------------------------------------------


def test_a_copied_pipeline_is_a_plain_one(sd: StableDiffusionPipeline) -> None:
    plain = generate(sd, [1], steps=8)
    with enable(sd, HALF) as handle:
        expected = generate(sd, [1], steps=8)
        other = copy.deepcopy(sd)
        assert type(other.scheduler) is diffusers.DDIMScheduler
        assert type(other.unet) is diffusers.UNet2DConditionModel
        assert torch.equal(generate(other, [1], steps=8), plain)
        assert handle.summary().steps == 8 and marks(handle) == ["##..##.."]
        assert torch.equal(generate(sd, [1], steps=8), expected)


def test_a_pipeline_made_of_an_enabled_one() -> None:
    """`from_pipe` wants models of exactly the class that it expects; it works again afterwards."""
    pipe = CASES["StableDiffusion"].build()
    make = diffusers.StableDiffusionImg2ImgPipeline.from_pipe
    with enable(pipe, HALF), pytest.raises(ValueError, match="unet"):
        make(pipe)
    assert make(pipe).unet is pipe.unet


# -- callbacks ----------------------------------------------------------------------------------


def test_a_prompt_that_changes_midway_is_computed(sd: StableDiffusionPipeline) -> None:
    def change(_pipe: Any, k: int, _t: Any, tensors: dict) -> dict:
        return {"prompt_embeds": tensors["prompt_embeds"].flip(1)} if k == 2 else {}

    with enable(sd, Pattern("##......")) as handle:
        generate(
            sd,
            [1, 2],
            steps=8,
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
    assert handle.summary().reasons[0][3] == "prompt changed"
    assert marks(handle) == ["##.#...."] * 2


@pytest.mark.parametrize(
    "scale, calls, expected",
    [
        (1.0, ["cond", "uncond"] * 2 + ["cond"], "##....#."),
        (9.0, ["cond"] * 2 + ["uncond"] + ["cond", "uncond"] * 2, "##.##.#."),
    ],
    ids=["off", "on"],
)
def test_guidance_in_calls_of_its_own_is_switched_midway(
    scale: float, calls: list[str], expected: str
) -> None:
    """Off: the other branch goes on as it was. On: it begins with a computed step."""
    case = CASES["Wan"]
    pipe = case.build()
    made = []

    def switch(pipe: Any, k: int, _t: Any, _tensors: dict) -> dict:
        if k == 2:
            pipe._guidance_scale = scale
        return {}

    def count(_module: Any, args: Any, kwargs: Any) -> None:
        made.append("cond" if torch.equal(kwargs["encoder_hidden_states"], prompt) else "uncond")

    inputs = case.inputs(pipe, [1], True)
    prompt = inputs["prompt_embeds"]
    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    with enable(pipe, Pattern("##....#.")) as handle:
        run(
            case, pipe, [1], 8,
            **{**inputs, "guidance_scale": 10.0 - scale}, callback_on_step_end=switch,
        )  # fmt: skip
    assert marks(handle) == [expected]
    assert made == calls


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("StableDiffusionXL", {}, 10),
        ("StableDiffusionXL", {"denoising_end": 0.5}, 5),
        ("image to image", {"strength": 0.6}, 6),
        ("image to image XL", {"strength": 0.6}, 6),
        ("Wan", {}, 10),
    ],
)
def test_the_criterion_knows_the_steps_that_are_taken(
    name: str, settings: dict[str, Any], expected: int
) -> None:
    case = CASES[name]
    pipe = case.build()
    with enable(pipe, HALF) as handle:
        run(case, pipe, [1], 10, **settings)
        course = handle._driver.criterion.course
    assert course.steps == handle.summary().steps == expected
    assert len(course.log_snr) == expected
    assert all(a < b for a, b in pairwise(course.log_snr))


def test_views_of_one_picture_are_refused(sd: StableDiffusionPipeline) -> None:
    """A panorama steps view after view at the same timestep."""
    views = torch.randn(2, 1, 4, 8, 8)
    with enable(sd, HALF), torch.no_grad():
        sd.scheduler.set_timesteps(8)
        with pytest.raises(ValueError, match=r"takes the same step twice.* call disable first"):
            for t in sd.scheduler.timesteps:
                for x in views:
                    sd.scheduler.step(sd.unet(x, t, torch.zeros(1, 7, 16)).sample, t, x)


def test_a_cache_of_diffusers_is_refused() -> None:
    pipe = CASES["Flux"].build()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"^enable: the transformer has a cache .*disable_cache"):
        enable(pipe, HALF)
    pipe.transformer.disable_cache()
    with enable(pipe, HALF):
        pass


# -- summaries ----------------------------------------------------------------------------------


def test_the_summary_says_when_enabled_parts_are_not_used(sd: StableDiffusionPipeline) -> None:
    with enable(sd, HALF) as handle:
        generate(sd, [1], steps=4)
        other = diffusers.EulerDiscreteScheduler.from_config(sd.scheduler.config)
        other.set_timesteps(4)
        handle._begin()  # a loop of one's own, with a scheduler that nobody has told us of
        x = torch.randn(1, 4, 8, 8)
        with torch.no_grad():
            for t in other.timesteps:
                scaled = other.scale_model_input(x, t)
                x = other.step(sd.unet(scaled, t, torch.zeros(1, 7, 16)).sample, t, x)[0]
        assert handle.summary().note == (
            "nothing was skipped: the model was called 4 times without a step of the scheduler "
            "that was enabled"
        )


def test_too_few_steps_to_skip_any(sd: StableDiffusionPipeline) -> None:
    with enable(sd, Adaptive(mode="paper")) as handle:
        generate(sd, [1], steps=3)
    assert handle.summary().note == "nothing was skipped: of 3 calls 3 by warm-up"
