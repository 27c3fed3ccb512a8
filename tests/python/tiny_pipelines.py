"""Tiny Stable Diffusion (XL), and what the tests of `enable` do with them."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from tiny_builders import BETAS, tiny_sdxl, tiny_stable_diffusion, tiny_unet
from tiny_methods import marks
from torch import Tensor

from sidestep.runtime.methods.adaptive import Adaptive

__all__ = ["BETAS", "marks", "tiny_sd", "tiny_sdxl", "tiny_unet"]

ALWAYS = Adaptive(mode="paper", threshold=1e9)  # skips whenever the cap allows it
NEVER = Adaptive(mode="paper", threshold=0.0)
MIXED = {
    "StableDiffusionPipeline": Adaptive(mode="paper", threshold=0.004),
    "StableDiffusionXLPipeline": Adaptive(mode="paper", threshold=0.06),
}  # decisions of the tiny pipelines that differ from prompt to prompt
PATTERN = "####.....#....#."  # what ALWAYS does in 16 steps, every row alike


def tiny_sd() -> StableDiffusionPipeline:
    return tiny_stable_diffusion()


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


class CountRows:
    """Counts the rows that really reach the network, below everything that is attached to it."""

    def __init__(self, pipe: Any) -> None:
        self.rows: list[int] = []
        pipe.unet.conv_in.register_forward_pre_hook(lambda _m, args: self.rows.append(len(args[0])))
