"""Tiny pipelines of diffusers with random weights, and what the tests of `enable` do with them."""

from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from sidestep.adapters.enable import Handle
from sidestep.runtime.methods.adaptive import Adaptive

ALWAYS = Adaptive(threshold=1e9)  # skips whenever the cap allows it
NEVER = Adaptive(threshold=0.0)
MIXED = {
    "StableDiffusionPipeline": Adaptive(threshold=0.004),
    "StableDiffusionXLPipeline": Adaptive(threshold=0.06),
}  # decisions of the tiny pipelines that differ from prompt to prompt
PATTERN = "####.....#....#."  # what ALWAYS does in 16 steps, every row alike

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_unet(**settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **settings,
    )
    unet.conv_out.weight.data.mul_(4)  # a louder model: prompts differ in their decisions
    return unet.eval()


def tiny_sd() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sdxl() -> StableDiffusionXLPipeline:
    unet = tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )
    pipe = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, prompts: list[int], steps: int = 16, **settings: Any) -> Tensor:
    """Latents of "prompts", each a seed of its text embedding and of its noise."""
    pipe_type = type(pipe).__name__
    guided = settings.get("guidance_scale", 5.0) > 1
    images = settings.get("num_images_per_prompt", 1)

    def embeds(*shape: int, offset: int = 0) -> Tensor:
        made = [
            torch.randn(shape, generator=torch.Generator().manual_seed(p + offset)) for p in prompts
        ]
        return torch.stack(made).to(pipe.unet.dtype)

    text = {"prompt_embeds": embeds(7, 16)}
    if guided:
        text["negative_prompt_embeds"] = embeds(7, 16, offset=1000)
    if pipe_type == "StableDiffusionXLPipeline":
        text["pooled_prompt_embeds"] = embeds(12)
        if guided:
            text["negative_pooled_prompt_embeds"] = embeds(12, offset=1000)
    noise = [torch.Generator().manual_seed(p + i) for p in prompts for i in range(images)]
    settings = {"guidance_scale": 5.0, "generator": noise, **settings}
    return pipe(num_inference_steps=steps, output_type="latent", **text, **settings).images


def marks(handle: Handle) -> list[str]:
    return ["".join(".#"[call] for call in row) for row in handle.summary().skip_map]


class CountRows:
    """Counts the rows that really reach the network, below everything that is attached to it."""

    def __init__(self, pipe: Any) -> None:
        self.rows: list[int] = []
        pipe.unet.conv_in.register_forward_pre_hook(lambda _m, args: self.rows.append(len(args[0])))
