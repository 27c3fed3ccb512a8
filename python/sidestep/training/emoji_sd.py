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

from sidestep.errors import UserError
from sidestep.training.average import Average
from sidestep.training.emoji_data import PACKAGE, VERSION, HeldOut, load_emoji
from sidestep.training.emoji_folder import (
    Encoded,
    check_folders,
    draw,
    encode,
    init_folder,
    load_alphas,
    load_models,
    read_lines,
    save_pipeline,
)
from sidestep.training.emoji_mix import Mix, build_examples
from sidestep.training.optimise import Progress, check_settings, optimise, seed_all

SHARES = {"focus": 0.35, "plain": 0.15, "moved": 0.10, "coloured": 0.20, "collage": 0.20}


@dataclass(frozen=True, kw_only=True)
class EmojiTraining:
    """Settings of one training run.

    Attributes:
        out: Folder to write; it must not exist, or be a pipeline folder, which is replaced.
        data: Folder in which the npm package was unpacked.
        init: Pipeline folder with VAE, tokenizer, scheduler, configs and starting weights; None for
            the bundled model. Its `compositions.txt` is the held-out test set, its `captions.txt`
            the captions that are shown most.
        from_scratch: Start UNet and text encoder from random weights.
        minutes: Length of the run by the clock, from the first line to the last step; or
        iterations: Length of the run in steps (then the result depends on nothing but the seed).
        batch: Pictures a step.
        lr: Peak learning rate, reached after 50 iterations; cosine to 0 over the whole run.
        coloured: How many recoloured pictures are prepared.
        collages: How many collages are prepared.
        ema: Decay of the averaged weights, which are what is saved.
        checkpoint_minutes: How often `out` is brought up to date during the run.
        seed: Of the pictures, the initial weights and the noise.
        threads: CPU threads; 0 leaves torch's own setting.
    """

    out: str | Path
    data: str | Path
    init: str | Path | None = None
    from_scratch: bool = False
    minutes: float | None = None
    iterations: int | None = None
    batch: int = 32
    lr: float = 4e-4
    coloured: int = 5000
    collages: int = 5000
    ema: float = 0.998
    checkpoint_minutes: float = 10.0
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self,
            positive=("batch", "lr", "checkpoint_minutes"),
            at_least_zero=("coloured", "collages", "seed", "threads"),
        )
        if not 0 <= self.ema < 1:
            raise UserError(f"training: ema is {self.ema}, expected at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run did: `losses` has one value an iteration, `captions` every distinct caption."""

    out: Path
    seconds: float
    losses: list[float]
    captions: list[str]


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
    emoji = load_emoji(settings.data)
    seed_all(settings.seed, settings.threads)
    mix = Mix(
        held_out=HeldOut(read_lines(init / "compositions.txt")),
        focus=frozenset(read_lines(init / "captions.txt")),
        coloured=settings.coloured,
        collages=settings.collages,
        seed=settings.seed,
    )
    examples = build_examples(emoji, mix)
    captions = list(dict.fromkeys(example.caption for example in examples))
    unet, text = load_models(init, settings.from_scratch)
    data = encode(init, examples, SHARES)
    average = Average([*unet.parameters(), *text.parameters()], settings.ema)
    losses: list[float] = []

    def save() -> None:
        card = model_card(settings, losses, len(captions))
        with average.swapped_in():
            save_pipeline(init, out, {"unet": unet, "text_encoder": text}, captions, card)

    saved = time.monotonic()
    alphas = load_alphas(init)
    generator = torch.Generator().manual_seed(settings.seed + 1)

    def loss() -> Tensor:
        return denoising_loss(unet, text, data, alphas, settings.batch, generator)

    for done in optimise(settings, start, average, loss, losses, progress):
        if done < 1 and time.monotonic() - saved > 60 * settings.checkpoint_minutes:
            save()
            saved = time.monotonic()
    save()
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
    recent = losses[-100:]
    start = "random weights" if settings.from_scratch else f"`{init_folder(settings.init).name}`"
    length = f"{settings.minutes} minutes" if settings.minutes else f"{settings.iterations} steps"
    return f"""# emoji-sd: a small, real Stable Diffusion pipeline

Text to 64x64 emoji, written by `sidestep train emoji-sd`. Load it with
`StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)`.

- Data: Noto emoji (google/noto-emoji images, Apache-2.0) from the npm package `{PACKAGE}`
  {VERSION}, plain, moved, recoloured ({settings.coloured}) and as collages ({settings.collages}):
  {captions} captions (`captions-all.txt`). The prompts of `compositions.txt` were held out. The VAE
  was also shown Twemoji (graphics CC-BY 4.0).
- Recipe: VAE unchanged; UNet and text encoder from {start}, epsilon MSE, 10 % of captions dropped,
  AdamW (weight decay 0.01, peak {settings.lr:g}, cosine to 0 over {length}), gradient norm 1, batch
  {settings.batch}, EMA {settings.ema}, seed {settings.seed}, fp32.
- So far {len(losses)} iterations; mean loss of the last {len(recent)}:
  {sum(recent) / max(len(recent), 1):.4f}.
"""
