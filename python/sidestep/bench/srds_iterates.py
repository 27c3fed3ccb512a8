"""The iterates of SRDS as pictures, beside the serial one that they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sidestep.adapters.catalogue import make_scheduler
from sidestep.adapters.denoiser import decode
from sidestep.adapters.enable import enable
from sidestep.metrics import psnr
from sidestep.runtime.methods.srds import SRDS, formation_ticks


@dataclass(frozen=True, kw_only=True)
class Iterates:
    """What `on_step` has shown of one generation.

    Attributes:
        steps: N.
        prompts: P of them.
        pictures: ``[P, K + 1, 3, H, W]`` in [0, 1], iterates 0 .. K.
        serial: ``[P, 3, H, W]``, the serial sampler's.
        ticks: ``[K + 1]`` sequential model calls until each iterate is there.
        stops: ``[P]``, the iterate at which SRDS stops by itself.
        ends: ``[P]``, the ticks that it has taken by then.
    """

    steps: int
    prompts: list[str]
    pictures: Tensor
    serial: Tensor
    ticks: list[int]
    stops: list[int]
    ends: list[int]

    def psnr(self, iterate: int) -> list[float]:
        """Of every picture in that iterate, to the serial one."""
        return psnr(self.pictures[:, iterate], self.serial)


@torch.no_grad()
def iterates(
    pipe: Any,
    method: SRDS,
    *,
    scheduler: str,
    steps: int,
    prompts: list[str],
    seeds: Sequence[int],
    guidance: float,
    most: int = 3,
) -> Iterates:
    """Makes the pictures three times: serially, as far as SRDS goes, and ``most`` iterations.

    Args:
        pipe: A Stable Diffusion pipeline; its scheduler is put back at the end.
        method: Settings of SRDS.
        scheduler: By its class.
        steps: Of the scheduler.
        prompts: P prompts.
        seeds: ``[P]`` of the noise of each.
        guidance: The guidance scale.
        most: Iterations that are shown; more if an image needs more to stop.
    """
    own = pipe.scheduler
    pipe.scheduler = make_scheduler(scheduler, None, own)
    latents = partial(_latents, pipe, steps, prompts, seeds, guidance)
    shown: dict[tuple[int, int], Tensor] = {}

    def show(iterate: int, x: Tensor, rows: Sequence[int]) -> None:
        shown.update({(row, iterate): each.clone() for row, each in zip(rows, x, strict=True)})

    try:
        serial = latents()
        with enable(pipe, method) as handle:
            latents()
            summary = handle.summary()
        most = max(most, *summary.iterations)
        with enable(pipe, replace(method, tolerance=0.0, max_iterations=most), on_step=show):
            latents()
    finally:
        pipe.scheduler = own
    bounds = method.bounds(steps)
    most = min(most, len(bounds) - 1)
    pictures = []
    for row in range(len(prompts)):
        for p in range(1, most + 1):  # one that equals the one before ends the generation
            shown.setdefault((row, p), shown[row, p - 1])
        pictures.append(torch.cat([decode(pipe, shown[row, p][None]) for p in range(most + 1)]))
    return Iterates(
        steps=steps,
        prompts=prompts,
        pictures=torch.stack(pictures),
        serial=torch.cat([decode(pipe, x[None]) for x in serial]),
        ticks=formation_ticks(bounds, most)[:, -1].tolist(),
        stops=list(summary.iterations),
        ends=list(summary.image_ticks),
    )


def _latents(
    pipe: Any, steps: int, prompts: list[str], seeds: Sequence[int], guidance: float
) -> Tensor:  # [P, C, h, w]
    made: Tensor = pipe(
        prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images  # fmt: skip
    return made
