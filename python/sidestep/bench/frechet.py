"""FD-small: a Frechet distance between two sets of pictures, in the features of a small network.

    FD = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^1/2 S_2 S_1^1/2)^1/2)

with mu and S the mean and the covariance of the features (Dowson & Landau 1982; Heusel et al.
2017). With S_1 = R_1^T R_1 and S_2 = R_2^T R_2 the last trace is the sum of the singular values of
R_1 R_2^T. torchmetrics takes it from the eigenvalues of S_1 S_2, which with fewer pictures than
features, as here, are mostly rounding: below 0 for a set and itself, and some percent too little
for one that is near (`tests/python/test_bench_exits.py`).

The features are those of the bundled UNet: its middle block on the code of the picture, with
no prompt and no noise at the last timestep, in the mean over positions. They are not Inception's,
and their numbers are not to be compared with any FID.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sidestep.models import load_pipeline

FEATURES = "mean over positions of emoji-sd's UNet middle block at t = 0, no prompt, no noise"
_TOGETHER = 32


class Features:
    """Pictures as numbers, by the model that ships."""

    def __init__(self) -> None:
        """Loads it."""
        self._pipe: Any = load_pipeline("emoji-sd")
        self._prompt = self._pipe.encode_prompt("", self._pipe.device, 1, False)[0]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:  # [N, 3, H, W] in [0, 1] -> [N, D] float64
        """The features of pictures, which are scaled to the model's size first."""
        return torch.cat([self._some(part) for part in images.split(_TOGETHER)]).double()

    def _some(self, images: Tensor) -> Tensor:
        unet, vae = self._pipe.unet, self._pipe.vae
        size = unet.config.sample_size * 2 ** (len(vae.config.encoder_block_out_channels) - 1)
        if images.shape[-2:] != (size, size):
            images = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
        code = vae.encode(2 * images - 1).latents * vae.config.scaling_factor
        found: list[Tensor] = []
        hook = unet.mid_block.register_forward_hook(lambda _m, _a, output: found.append(output))
        try:
            unet(code, 0, encoder_hidden_states=self._prompt.expand(len(code), -1, -1))
        finally:
            hook.remove()
        return found[0].flatten(2).mean(2)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """FD between two sets of features, ``[N, D]`` and ``[M, D]``, of two or more each."""
    (mean_a, root_a), (mean_b, root_b) = (_moments(x) for x in (a, b))
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = sum(x.square().sum() for x in (mean_a - mean_b, root_a, root_b)) - 2 * cross
    return float(distance.clamp(min=0))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:  # [D], [min(N, D), D]
    """mu, and R with S = R^T R."""
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"frechet_distance: got shape {list(x.shape)}, expected [2 or more, D]")
    mean = x.double().mean(0)
    return mean, torch.linalg.qr((x.double() - mean) / (len(x) - 1) ** 0.5).R
