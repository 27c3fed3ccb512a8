"""Trains the bundled emoji model: a Stable Diffusion pipeline small enough for one CPU core.

The text encoder and the UNet are trained together on the noise-prediction loss

    L = mean || eps - eps_theta(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t, text(c)) ||^2

(Ho et al., DDPM, Alg. 1; captions dropped for guidance as in Ho and Salimans, Alg. 1), on the VAE
latents x_0 of Noto emoji and of pictures composed of them (`emoji_mix`). VAE, tokenizer, scheduler
and all configs come from the `init` folder and stay as they are: `emoji_codec` trains those two.
With `from_scratch=True` UNet and text encoder start from random weights of the same shape.

Data: `npm pack emoji-datasource-google@16.0.0`, unpacked with tar in the `data` folder.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sidestep.training.average import Average
from sidestep.training.emoji_folder import (
    Encoded,
    check_folders,
    draw,
    encode,
    init_folder,
    load_alphas,
    load_models,
    save_pipeline,
)
from sidestep.training.emoji_run import (
    SHARES,
    DenoiserTraining,
    TrainingResult,
    data_card,
    load_examples,
    progress_card,
)
from sidestep.training.optimise import Progress, check_settings, optimise, run_saving, seed_all


@dataclass(frozen=True, kw_only=True)
class EmojiTraining(DenoiserTraining):
    """Settings of one training run: those of `DenoiserTraining`; the rate falls as a cosine to 0.

    Attributes:
        from_scratch: Start UNet and text encoder from random weights.
    """

    from_scratch: bool = False
    batch: int = 32
    lr: float = 4e-4
    ema: float = 0.998
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        check_settings(
            self,
            positive=("batch", "lr", "checkpoint_minutes"),
            at_least_zero=("coloured", "collages", "seed", "threads"),
        )
        super().__post_init__()


def train(settings: EmojiTraining, progress: Progress | None = None) -> TrainingResult:
    """Trains, and saves the averaged weights to `settings.out` now and then and at the end.

    Args:
        settings: See `EmojiTraining`.
        progress: Called after each iteration with (iterations, share done, loss, learning rate).

    Raises:
        UserError: The data, init or output folder cannot be used; the message says what to do.
    """
    start = time.monotonic()
    init, out = init_folder(settings.init), Path(settings.out)
    check_folders(init, out)
    seed_all(settings.seed, settings.threads)
    examples, captions = load_examples(settings, init)
    unet, text = load_models(init, settings.from_scratch)
    data = encode(init, examples, SHARES)
    average = Average([*unet.parameters(), *text.parameters()], settings.ema)
    losses: list[float] = []

    def save() -> None:
        card = model_card(settings, losses, len(captions))
        with average.swapped_in():
            save_pipeline(init, out, {"unet": unet, "text_encoder": text}, captions, card)

    alphas = load_alphas(init)
    generator = torch.Generator().manual_seed(settings.seed + 1)

    def loss() -> Tensor:
        return denoising_loss(unet, text, data, alphas, settings.batch, generator)

    steps = optimise(settings, start, average, loss, losses, progress)
    run_saving(steps, settings.checkpoint_minutes, save)
    seconds = time.monotonic() - start
    return TrainingResult(out=out, seconds=seconds, losses=losses, captions=captions)


def denoising_loss(
    unet: nn.Module,
    text: nn.Module,
    data: Encoded,
    alphas: Tensor,  # [T] fp32: cumulative products abar_t
    batch: int,
    generator: torch.Generator,
) -> Tensor:  # []
    """One batch of the loss above."""
    drawn = draw(data, alphas, batch, generator)
    tokens = torch.where(drawn.dropped, data.empty, data.tokens[drawn.rows])  # [batch, L]
    x = drawn.x.contiguous(memory_format=torch.channels_last)
    predicted = unet(x, drawn.t, text(tokens)[0]).sample  # [batch, 4, h, w]
    return (predicted - drawn.noise).square().mean()


def model_card(settings: EmojiTraining, losses: list[float], captions: int) -> str:
    """The README of the folder: what it was trained on and how, attributions included."""
    start = "random weights" if settings.from_scratch else f"`{init_folder(settings.init).name}`"
    length = f"{settings.minutes} minutes" if settings.minutes else f"{settings.iterations} steps"
    return f"""# emoji-sd: a small, real Stable Diffusion pipeline

Text to 64x64 emoji, written by `sidestep train emoji-sd`. Load it with
`StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)`.

{data_card(settings, captions)}
- Recipe: VAE unchanged; UNet and text encoder from {start}, epsilon MSE, 10 % of captions dropped,
  AdamW (weight decay 0.01, peak {settings.lr:g}, cosine to 0 over {length}), gradient norm 1, batch
  {settings.batch}, EMA {settings.ema}, seed {settings.seed}, fp32.
{progress_card(losses)}
"""
