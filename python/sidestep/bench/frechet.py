"""FD-small: a Frechet distance between two sets of pictures, in the features of a small network.

    FD = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1^1/2 S_2 S_1^1/2)^1/2)

with mu and S the mean and the covariance of the features (Dowson & Landau 1982; Heusel et al.
2017). The features are those of the bundled UNet: its middle block on the code of the picture, with
no prompt and no noise at the last timestep, in the mean over positions. They are not Inception's,
and their numbers are not to be compared with any FID.
"""

from __future__ import annotations

from typing import Any

import numpy as np
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
    (mean_a, cov_a), (mean_b, cov_b) = (_moments(x) for x in (a, b))
    root = _root(cov_a)
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


def _moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:  # [D], [D, D]
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"frechet_distance: got shape {list(x.shape)}, expected [2 or more, D]")
    values = x.double().numpy()
    return values.mean(0), np.atleast_2d(np.cov(values, rowvar=False))


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values.clip(0))) @ vectors.T)
