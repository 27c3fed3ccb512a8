"""`enable` on unmodified pipelines: what is computed, what is held, and that nothing is stale."""

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipelines import ALWAYS, BETAS, MIXED, NEVER, PATTERN, CountRows, generate, marks, tiny_sd

from sidestep.adapters.enable import enable
from sidestep.adapters.scheduler import SidestepScheduler
from sidestep.models import load_pipeline
from sidestep.runtime.methods.adaptive import Adaptive

# -- what is computed -------------------------------------------------------------------------


def test_batched_equals_each_prompt_alone(pipe: Any) -> None:
    prompts = [1, 2, 3]
    method = MIXED[type(pipe).__name__]
    with enable(pipe, method) as handle:
        together = generate(pipe, prompts, steps=18)
        summary, rows = handle.summary(), marks(handle)
        assert len(set(rows)) > 1 and all("." in row for row in rows)
        for i, prompt in enumerate(prompts):
            alone = generate(pipe, [prompt], steps=18)
            assert marks(handle) == [rows[i]]
            assert handle.summary().reasons == (summary.reasons[i],)
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance, branches", [(5.0, 2), (1.0, 1)])
def test_rows_that_skip_leave_the_batch(pipe: Any, guidance: float, branches: int) -> None:
    counted = CountRows(pipe)
    method = MIXED[type(pipe).__name__]
    with enable(pipe, method) as handle:
        generate(pipe, [1, 2, 3], guidance_scale=guidance)
        summary = handle.summary()
    per_step = [sum(row[k] for row in summary.skip_map) * branches for k in range(16)]
    assert counted.rows == [rows for rows in per_step if rows]
    assert len(counted.rows) == summary.ticks
    assert sum(counted.rows) == branches * sum(summary.nfe) < branches * 48


def test_nothing_skipped_is_bit_identical(pipe: Any) -> None:
    plain = generate(pipe, [1, 2])
    with enable(pipe, NEVER) as handle:
        assert torch.equal(generate(pipe, [1, 2]), plain)
    assert handle.summary().nfe == (16.0, 16.0)
    assert handle.summary().note.startswith("nothing was skipped: of 32 calls 24 by criterion")
    assert torch.equal(generate(pipe, [1, 2]), plain)


def test_held_outputs_are_combined_and_stepped_as_usual(sd: StableDiffusionPipeline) -> None:
    """The published loop by hand: the raw output of the last call, before guidance."""
    prompts = [7]
    with enable(sd, ALWAYS):
        ours = generate(sd, prompts)
    embeds = [
        torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1007, 7)
    ]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    sd.scheduler.set_timesteps(16)
    with torch.no_grad():
        for mark, t in zip(PATTERN, sd.scheduler.timesteps, strict=True):
            if mark == "#":
                raw = sd.unet(torch.cat([x, x]), t, torch.cat(embeds)).sample
            uncond, cond = raw.chunk(2)
            x = sd.scheduler.step(uncond + 5.0 * (cond - uncond), t, x).prev_sample
    assert torch.equal(ours, x)


def test_several_images_per_prompt(sd: StableDiffusionPipeline) -> None:
    with enable(sd, MIXED["StableDiffusionPipeline"]) as handle:
        four = generate(sd, [1, 3], num_images_per_prompt=2)
        rows = marks(handle)
        assert len(rows) == 4
        for i, (prompt, image) in enumerate([(1, 0), (1, 1), (3, 0), (3, 1)]):
            noise = [torch.Generator().manual_seed(prompt + image)]
            alone = generate(sd, [prompt], generator=noise)
            assert marks(handle) == [rows[i]]
            torch.testing.assert_close(alone[0], four[i], rtol=1e-4, atol=1e-4)


def test_half_precision() -> None:
    pipe = tiny_sd().to(torch.bfloat16)
    with enable(pipe, Adaptive(mode="paper", threshold=0.02)) as handle:
        latents = generate(pipe, [1, 2])
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
    assert any("." in row for row in marks(handle))


def test_repeated_timesteps_count_as_steps(sd: StableDiffusionPipeline) -> None:
    sd.scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True)
    with enable(sd, ALWAYS) as handle:
        generate(sd, [1], steps=15)  # 16 calls: the second timestep comes twice
    assert marks(handle) == [PATTERN]


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DEIS"])
def test_other_schedulers(sd: StableDiffusionPipeline, name: str) -> None:
    kind = getattr(diffusers, f"{name.replace('DEIS', 'DEISMultistep')}Scheduler")
    sd.scheduler = kind.from_config(sd.scheduler.config)
    with enable(sd, ALWAYS) as handle:
        generate(sd, [1, 2])
    assert marks(handle) == [PATTERN] * 2


def test_our_scheduler_and_its_step_sizes(sd: StableDiffusionPipeline) -> None:
    sd.scheduler = SidestepScheduler.from_config(sd.scheduler.config)
    latents = []

    def keep(_pipe: Any, _k: int, _t: Any, tensors: dict) -> dict:
        latents.append(tensors["latents"].clone())
        return {}

    with enable(sd, MIXED["StableDiffusionPipeline"]) as handle:
        generate(sd, [1, 2], callback_on_step_end=keep)
    sizes = [(b - a).abs().mean((1, 2, 3)) for a, b in pairwise(latents)]
    for k in range(4, 16):  # decided from the three steps before
        before, previous, current = sizes[k - 4 : k - 1]
        expected = ((current + before) / 2 - previous).abs() / previous
        got = torch.tensor([row[k] for row in handle.summary().criterion])
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


# -- nothing is stale ---------------------------------------------------------------------------


def test_generations_do_not_see_each_other(pipe: Any) -> None:
    jobs: list[tuple[list[int], dict[str, Any]]] = [
        ([1, 2], {"steps": 10}),
        ([3, 4], {"steps": 10}),  # same shapes, other prompts
        ([1, 2, 3], {"steps": 8}),
        ([1, 2], {"steps": 10, "height": 32, "width": 96}),
        ([1, 2], {"steps": 10, "guidance_scale": 1.0}),
        ([5], {"steps": 10}),
    ]
    fresh = []
    for prompts, settings in jobs:
        with enable(pipe, ALWAYS):
            fresh.append(generate(pipe, prompts, **settings))
    with enable(pipe, ALWAYS) as handle:
        for expected, (prompts, settings) in zip(fresh, jobs, strict=True):
            assert torch.equal(generate(pipe, prompts, **settings), expected)
            assert handle.summary().steps == settings["steps"]


def test_an_exception_leaves_nothing_behind(sd: StableDiffusionPipeline) -> None:
    def fail(_pipe: Any, k: int, _t: Any, _tensors: dict) -> dict:
        if k == 6:
            raise KeyboardInterrupt
        return {}

    with enable(sd, ALWAYS):
        expected = generate(sd, [1, 2])
    with enable(sd, ALWAYS) as handle:
        with pytest.raises(KeyboardInterrupt):
            generate(sd, [3, 4], callback_on_step_end=fail)
        assert not handle._driver._generation.calls
        assert torch.equal(generate(sd, [1, 2]), expected)


def test_guidance_switched_off_midway(sd: StableDiffusionPipeline) -> None:
    def cut(pipe: Any, k: int, _t: Any, tensors: dict) -> dict:
        if k != 5:
            return {}
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"][-2:]}

    counted = CountRows(sd)
    with enable(sd, ALWAYS) as handle:
        generate(
            sd,
            [1, 2],
            callback_on_step_end=cut,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
    assert marks(handle) == ["####..#..#....#."] * 2
    assert handle.summary().reasons[0][6] == "batch changed"
    assert counted.rows == [4] * 4 + [2] * 3


def test_writing_into_the_output_changes_nothing(sd: StableDiffusionPipeline) -> None:
    """Some pipelines do ``noise_pred += ...`` on what the model returned."""
    with enable(sd, ALWAYS):
        expected = generate(sd, [1])
        sd.scheduler.set_timesteps(16)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        embeds = [
            torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(p)) for p in (1001, 1)
        ]
        with torch.no_grad():
            for t in sd.scheduler.timesteps:
                raw = sd.unet(torch.cat([x, x]), t, torch.cat(embeds), return_dict=False)[0]
                uncond, cond = (part.clone() for part in raw.chunk(2))
                raw += 1000
                x = sd.scheduler.step(uncond + 5.0 * (cond - uncond), t, x).prev_sample
    assert torch.equal(x, expected)


@pytest.mark.parametrize("return_dict", [True, False])
def test_structure_of_the_output_is_kept(sd: StableDiffusionPipeline, return_dict: bool) -> None:
    kinds = set()
    with enable(sd, ALWAYS), torch.no_grad():
        sd.scheduler.set_timesteps(8)
        x = torch.randn(1, 4, 8, 8)
        for t in sd.scheduler.timesteps:
            output = sd.unet(x, t, torch.zeros(1, 7, 16), return_dict=return_dict)
            kinds.add(type(output))
            u = output.sample if return_dict else output[0]
            x = sd.scheduler.step(u, t, x)[0]
    name = "UNet2DConditionOutput" if return_dict else "tuple"
    assert [kind.__name__ for kind in kinds] == [name]


# -- the bundled model --------------------------------------------------------------------------


def test_the_bundled_model() -> None:
    emoji = load_pipeline("emoji-sd")
    prompts = ["frog on a bicycle", "blue tiger face", "rocket in the rain"]
    settings = {"num_inference_steps": 12, "guidance_scale": 7.5, "output_type": "pt"}
    noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
    with enable(emoji, Adaptive(mode="paper", threshold=0.02)) as handle:
        together = emoji(prompts, generator=noise, **settings).images
        summary, rows = handle.summary(), marks(handle)
        assert len(set(rows)) > 1 and all("." in row for row in rows)
        assert summary.nfe == tuple(float(row.count("#")) for row in rows)
        alone = emoji(prompts[2], generator=torch.Generator().manual_seed(2), **settings).images
        assert marks(handle) == [rows[2]]
    torch.testing.assert_close(alone[0], together[2], rtol=0, atol=1e-4)
    assert together.std() > 0.1
