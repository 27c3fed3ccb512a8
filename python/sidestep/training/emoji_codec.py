"""Trains the tokenizer and the autoencoder of the bundled emoji model, before everything else.

The tokenizer is byte-pair encoding on the captions. The autoencoder E, D (`AutoencoderTiny`) is
trained on pictures x in [-1, 1] and latents z = E(x) by

    L = mean |D(z + s n) - x| + 1/2 mean |grad D(z + s n) - grad x| + mean (D(z + s n) - x)^2
        + w mean max(|z| - 3, 0)^2                                   n ~ N(0, 1), s = 0.1

where grad are differences of neighbouring pixels. The noise keeps the latents from hiding detail
in small numbers, which a diffusion model could not reproduce; the last term keeps them in range.

Data: the npm package of `emoji_sd`, and any other set unpacked below the same folder (Twemoji:
`npm pack emoji-datasource-twitter@16.0.0`). The folder that comes out is a whole pipeline whose
UNet and text encoder are random: `emoji_sd` with ``from_scratch=True`` trains those.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sidestep.errors import UserError
from sidestep.training.average import Average
from sidestep.training.emoji_data import SIDE, load_emoji, on_white
from sidestep.training.emoji_folder import (
    check_folders,
    init_folder,
    load_models,
    read_lines,
    save_pipeline,
)
from sidestep.training.emoji_run import FolderTraining
from sidestep.training.optimise import Progress, check_settings, optimise, seed_all

VOCABULARY = 2048
LATENT_NOISE = 0.1
LATENT_RANGE = 3.0
RANGE_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class CodecTraining(FolderTraining):
    """Settings of one run: those of `FolderTraining`; the rate falls as a cosine to 0.

    Of `init` only the configs count, which give the shapes.
    """

    batch: int = 64
    lr: float = 2e-3
    ema: float = 0.99

    def __post_init__(self) -> None:
        check_settings(self, positive=("batch", "lr"), at_least_zero=("seed", "threads"))


@dataclass(frozen=True, kw_only=True)
class CodecResult:
    """What a run did: `losses` has one value an iteration, `psnr` is of the reconstructions."""

    out: Path
    seconds: float
    losses: list[float]
    psnr: float


def train_codec(settings: CodecTraining, progress: Progress | None = None) -> CodecResult:
    """Trains tokenizer and autoencoder, and saves a whole pipeline folder.

    Args:
        settings: See `CodecTraining`.
        progress: Called after each iteration with (iterations, share done, loss, learning rate).

    Raises:
        UserError: The data, init or output folder cannot be used; the message says what to do.
    """
    from diffusers import AutoencoderTiny

    start = time.monotonic()
    init, out = init_folder(settings.init), Path(settings.out)
    check_folders(init, out)
    emoji = load_emoji(settings.data)
    pictures = load_pictures(Path(settings.data))
    seed_all(settings.seed, settings.threads)
    vae: Any = AutoencoderTiny.from_config(AutoencoderTiny.load_config(init, subfolder="vae"))
    vae = vae.to(memory_format=torch.channels_last).train()
    average = Average(list(vae.parameters()), settings.ema)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    losses: list[float] = []

    def loss() -> Tensor:
        rows = torch.randint(len(pictures), (settings.batch,), generator=generator)
        return reconstruction_loss(vae, _scaled(pictures[rows]), generator)

    for _ in optimise(settings, start, average, loss, losses, progress):
        pass
    with average.swapped_in():
        psnr, spread = _measure(vae, pictures[:: max(1, len(pictures) // 512)])
        vae.register_to_config(scaling_factor=1.0 / spread)
        unet, text = load_models(init, from_scratch=True)
        captions = list(dict.fromkeys([one.name for one in emoji]))
        tokenizer = train_tokenizer(init, captions + read_lines(init / "captions.txt"))
        card = _card(settings, len(pictures), len(losses), psnr)
        models = {"unet": unet, "text_encoder": text, "vae": vae}
        save_pipeline(init, out, models, captions, card, configs=["vae"], tokenizer=tokenizer)
    seconds = time.monotonic() - start
    return CodecResult(out=out, seconds=seconds, losses=losses, psnr=psnr)


def load_pictures(folder: Path) -> Tensor:  # [N, 3, 64, 64] uint8
    """Every 64-pixel picture of every emoji package below ``folder``, on white.

    Raises:
        UserError: There is none, or one cannot be read.
    """
    files = sorted(folder.glob(f"**/img/*/{SIDE}/*.png"))
    if not files:
        raise UserError(f"{folder}: no emoji package is unpacked below it (img/*/{SIDE}/*.png)")
    pictures = np.empty((len(files), SIDE, SIDE, 3), np.uint8)
    for i, file in enumerate(files):
        try:
            with Image.open(file) as image:
                resized = image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        except OSError as error:
            raise UserError(f"{file}: cannot read the picture: {error}") from error
        pictures[i] = on_white(np.asarray(resized, np.float32) / 255)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def train_tokenizer(init: Path, captions: list[str]) -> Any:
    """A tokenizer like the folder's, with a vocabulary of its own learned from the captions."""
    from transformers import CLIPTokenizer

    template = CLIPTokenizer.from_pretrained(init, subfolder="tokenizer")
    return template.train_new_from_iterator([captions], vocab_size=VOCABULARY)


def reconstruction_loss(
    vae: nn.Module,
    x: Tensor,  # [n, 3, 64, 64] in [-1, 1]
    generator: torch.Generator,
) -> Tensor:  # []
    """The loss above."""
    coder: Any = vae
    z = coder.encoder(x)
    noise = torch.randn(z.shape, generator=generator)
    error = coder.decoder(z + LATENT_NOISE * noise) - x
    across, down = error.diff(dim=3), error.diff(dim=2)
    gradient = 0.5 * (across.abs().mean() + down.abs().mean())
    outside = (z.abs() - LATENT_RANGE).clamp(min=0).square().mean()
    return error.abs().mean() + 0.5 * gradient + error.square().mean() + RANGE_WEIGHT * outside


@torch.no_grad()
def _measure(vae: Any, pictures: Tensor) -> tuple[float, float]:
    """PSNR of the reconstructions in dB, over [0, 1], and the standard deviation of the latents."""
    errors, latents = [], []
    for chunk in pictures.split(64):
        x = _scaled(chunk)
        z = vae.encoder(x)
        errors.append(((vae.decoder(z).clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)))
        latents.append(z.flatten())
    return float(-10 * torch.cat(errors).mean().log10()), float(torch.cat(latents).std())


def _scaled(pictures: Tensor) -> Tensor:  # [n, 3, 64, 64] uint8 -> [-1, 1]
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _card(settings: CodecTraining, pictures: int, iterations: int, psnr: float) -> str:
    return f"""# emoji-sd: tokenizer and autoencoder, before the UNet is trained

Written by `sidestep train emoji-codec`. The UNet and the text encoder are random: train them with
`sidestep train emoji-sd --init THIS_FOLDER --from-scratch`.

- Data: {pictures} pictures of the npm packages emoji-datasource-* (Noto emoji, Apache-2.0; Twemoji
  graphics, CC-BY 4.0).
- Recipe: L1 + 0.5 gradient L1 + MSE, latent noise {LATENT_NOISE}, magnitudes above {LATENT_RANGE:g}
  penalised; AdamW, peak {settings.lr:g}, cosine to 0, batch {settings.batch}, EMA {settings.ema},
  seed {settings.seed}, {iterations} iterations. Reconstruction {psnr:.1f} dB.
"""
