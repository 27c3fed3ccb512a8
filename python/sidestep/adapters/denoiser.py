"""A pipeline's model as the function that `Plan.run` calls, guidance included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GuidedDenoiser:
    """``denoiser(x, t) -> u``: one batched call on [uncond; cond], combined by the guidance scale.

    u = u_uncond + guidance (u_cond - u_uncond)                       (Ho & Salimans 2022, eq. 6)

    Attributes:
        nfe: Calls made so far; a guidance pair counts as one.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: list[str],
        guidance: float | Tensor,  # [B, 1, 1, 1]
    ) -> None:
        """Encodes the prompts once.

        Args:
            pipe: A Stable Diffusion pipeline.
            prompts: B prompts.
            guidance: The guidance scale, or one for each prompt; the number 1 leaves the
                unconditional branch out.
        """
        self.unet = pipe.unet
        self.guidance = guidance
        self.nfe = 0
        guided = isinstance(guidance, Tensor) or guidance != 1
        with torch.no_grad():
            cond, uncond = pipe.encode_prompt(prompts, pipe.device, 1, guided)
        self.embeddings = torch.cat([uncond, cond]) if guided else cond

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        """The guided prediction at model time ``t``."""
        self.nfe += 1
        copies = self.embeddings.shape[0] // x.shape[0]
        u = self.unet(torch.cat([x] * copies), t, encoder_hidden_states=self.embeddings).sample
        if copies == 1:
            return u
        uncond, cond = u.chunk(2)
        return uncond + self.guidance * (cond - uncond)


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in [0, 1] of latents ``[B, C, h, w]``."""
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1)


def first_noise(pipe: Any, seed: int, count: int) -> Tensor:  # [count, C, h, w]
    """The unit noise that image ``i`` starts from: drawn by a generator seeded ``seed + i``."""
    config = pipe.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])
