"""The table of pipelines that `enable` is tested on: how each is built, called, and counted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tiny_builders as build
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

FRAMES = 3


@dataclass(frozen=True)
class Case:
    """One way to use a pipeline.

    Attributes:
        build: Makes it.
        inputs: Its arguments for these "prompts", each a seed, with guidance or without.
        probe: A submodule that sees every row of the model's batch once a call.
        probed: Rows of that submodule for each row of the model's batch (frames).
        guided: Copies of every sample in the model's batches of one step.
        calls: Model calls of one step with guidance.
        networks: Where the probe is looked for.
    """

    build: Callable[[], Any]
    inputs: Callable[[Any, Sequence[int], bool], dict[str, Any]]
    probe: str = "conv_in"
    probed: int = 1
    guided: int = 2
    calls: int = 1
    networks: tuple[str, ...] = ("unet",)
    settings: dict[str, Any] = field(default_factory=dict)


def noise(prompts: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(prompt) for prompt in prompts]


def randn(prompts: Sequence[int], *shape: int, offset: int = 0) -> Tensor:
    """``[len(prompts), *shape]``, each row from its own seed."""
    rows = [torch.randn(shape, generator=g) for g in noise([p + offset for p in prompts])]
    return torch.stack(rows)


def text(prompts: Sequence[int], guided: bool, pooled: int = 0) -> dict[str, Any]:
    made = {"prompt_embeds": randn(prompts, build.TOKENS, build.WIDTH)}
    if pooled:
        made["pooled_prompt_embeds"] = randn(prompts, pooled)
    if guided:
        for name, value in list(made.items()):
            made[f"negative_{name}"] = randn(prompts, *value.shape[1:], offset=1000)
    return made


def stable_diffusion(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    scale = {"guidance_scale": 5.0 if guided else 1.0}
    return {**text(prompts, guided), **scale, "generator": noise(prompts)}


def sdxl(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    return {**stable_diffusion(pipe, prompts, guided), **text(prompts, guided, pooled=12)}


def sd3(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    return {**sdxl(pipe, prompts, guided), "height": 8, "width": 8}


def flux(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    return {
        **text(prompts, guided, pooled=12),
        "true_cfg_scale": 3.0 if guided else 1.0,
        "guidance_scale": 3.5,
        "generator": noise(prompts),
        "height": 64,
        "width": 64,
    }


def pixart(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    mask = torch.ones(len(prompts), build.TOKENS)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone()}
    return {
        **stable_diffusion(pipe, prompts, guided),
        **masks,
        "negative_prompt": None,
        "use_resolution_binning": False,
        "height": 8,
        "width": 8,
    }


def dit(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    scale = 4.0 if guided else 1.0
    return {
        "class_labels": list(prompts),
        "guidance_scale": scale,
        "generator": noise(prompts),
        "output_type": "pt",
    }


def latent_diffusion(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    return {
        "prompt": [f"p{prompt}" for prompt in prompts],
        "guidance_scale": 5.0 if guided else 1.0,
        "generator": noise(prompts),
        "height": 64,
        "width": 64,
        "output_type": "pt",
    }


def text_to_video(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    sizes = {"num_frames": FRAMES, "height": 8, "width": 8}
    return {**stable_diffusion(pipe, prompts, guided), **sizes}


def i2vgen(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    pictures = randn(prompts, 3, 8, 8, offset=500).clamp(-1, 1)
    torch.manual_seed(0)  # the pipeline draws from torch's own generator
    return {**text_to_video(pipe, prompts, guided), "image": pictures}


def video_diffusion(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    return {
        "image": randn(prompts, 3, 32, 32, offset=500).sigmoid(),
        "height": 8,
        "width": 8,
        "num_frames": FRAMES,
        "min_guidance_scale": 1.0,
        "max_guidance_scale": 3.0 if guided else 1.0,
        "noise_aug_strength": 0.0,
        "generator": noise(prompts),
    }


def wan(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    return {
        **stable_diffusion(pipe, prompts, guided),
        "height": 32,
        "width": 32,
        "num_frames": 5,
    }


def image_to_image(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    latents = randn(prompts, 4, 8, 8, offset=500)
    return {**stable_diffusion(pipe, prompts, guided), "image": latents, "strength": 0.8}


def sdxl_image_to_image(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    return {**image_to_image(pipe, prompts, guided), **text(prompts, guided, pooled=12)}


def inpaint(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    mask = torch.zeros(len(prompts), 1, 8, 8)
    mask[..., :4] = 1
    return {
        **image_to_image(pipe, prompts, guided),
        "mask_image": mask,
        "masked_image_latents": randn(prompts, 4, 8, 8, offset=500),
        "height": 8,
        "width": 8,
        "strength": 1.0,
    }


def controlnet(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    return {
        **stable_diffusion(pipe, prompts, guided),
        "image": randn(prompts, 3, 8, 8, offset=500).sigmoid(),
        "height": 8,
        "width": 8,
    }


def ip_adapter(pipe: Any, prompts: Sequence[int], guided: bool) -> dict[str, Any]:
    embeds = randn([500], 1, build.WIDTH)  # one picture for all prompts
    if guided:
        embeds = torch.cat([torch.zeros_like(embeds), embeds])
    return {**stable_diffusion(pipe, prompts, guided), "ip_adapter_image_embeds": [embeds]}


def transformer(make: Callable[[], Any], inputs: Any, probe: str = "proj_out", **more: Any) -> Case:
    return Case(make, inputs, probe=probe, networks=("transformer",), **more)


def _sd(kind: str = "", **unet: Any) -> Callable[[], Any]:
    return lambda: build.tiny_stable_diffusion(kind, **unet)


CASES = {
    "StableDiffusion": Case(_sd(), stable_diffusion),
    "guidance rescaled": Case(_sd(), stable_diffusion, settings={"guidance_rescale": 0.7}),
    "StableDiffusionXL": Case(build.tiny_sdxl, sdxl),
    "StableDiffusion3": transformer(build.tiny_sd3, sd3),
    "Flux": transformer(build.tiny_flux, flux, guided=2, calls=2),
    "PixArtSigma": transformer(build.tiny_pixart, pixart),
    "DiT": transformer(build.tiny_dit, dit, "proj_out_2"),
    "LDMTextToImage": Case(build.tiny_latent_diffusion, latent_diffusion),
    "I2VGenXL": Case(build.tiny_i2vgen, i2vgen, probed=FRAMES),
    "TextToVideoSD": Case(build.tiny_text_to_video, text_to_video, probed=FRAMES),
    "StableVideoDiffusion": Case(build.tiny_video_diffusion, video_diffusion, probed=FRAMES),
    "Wan": transformer(build.tiny_wan, wan, calls=2),
    "Wan 2.2": Case(
        lambda: build.tiny_wan(second=True),
        wan,
        probe="proj_out",
        calls=2,
        networks=("transformer", "transformer_2"),
    ),
    "image to image": Case(_sd("Img2Img"), image_to_image),
    "image to image XL": Case(lambda: build.tiny_sdxl("Img2Img"), sdxl_image_to_image),
    "inpaint, 4 channels": Case(_sd("Inpaint"), inpaint),
    "inpaint, 9 channels": Case(_sd("Inpaint", in_channels=9), inpaint),
    "ControlNet": Case(
        lambda: build.tiny_stable_diffusion("ControlNet", build.tiny_controlnet()),
        controlnet,
    ),
    "IP-Adapter": Case(build.tiny_ip_adapter, ip_adapter),
}


def run(
    case: Case,
    pipe: Any,
    prompts: Sequence[int],
    steps: int = 16,
    guided: bool = True,
    **settings: Any,
) -> Tensor:
    """The latents (or pictures, where a pipeline gives no latents) of the prompts, ``[n, ...]``."""
    given = tree_map_only(Tensor, lambda x: x.to(pipe.device), case.inputs(pipe, prompts, guided))
    inputs = {"output_type": "latent", **given, **case.settings}
    output = pipe(num_inference_steps=steps, **{**inputs, **settings})
    return output[0]
