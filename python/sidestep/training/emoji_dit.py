"""Trains a diffusion transformer: a PixArt pipeline small enough for one CPU core.

The transformer (`PixArtTransformer2DModel`, constant width) learns the noise of `emoji_sd`, on the
same pictures, latents x_0 and noise levels; VAE, text encoder, tokenizer and scheduler are those of
the `init` folder and stay as they are. The loss is

    L = mean min(SNR_t, 5) / SNR_t || eps - eps_theta(x_t, t, text(c)) ||^2,
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   SNR_t = abar_t / (1 - abar_t)

(Hang et al., Efficient Diffusion Training via Min-SNR Weighting, eq. 7; captions dropped for
guidance as in Ho and Salimans, Alg. 1). Initial weights are as Peebles and Xie's and PixArt's.

The learning rate stays where it is after the warm-up, so that a run may last as long as there is
time for, over several sessions: it is kept in `OUT.checkpoint` and goes on with `resume`. A run
with `cool_down` ends it: from that file it takes the rate to 0, and leaves the file as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.errors import UserError
from sidestep.training.average import Average
from sidestep.training.checkpoint import Checkpoint, read_checkpoint, resume_from
from sidestep.training.emoji_folder import (
    Encoded,
    check_folders,
    draw,
    encode,
    init_folder,
    load_alphas,
    load_text_encoder,
    pipeline_index,
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
from sidestep.training.optimise import (
    LENGTHS,
    Progress,
    Schedule,
    check_settings,
    constant,
    cooling,
    optimise,
    run_saving,
    seed_all,
)

PIPELINE = "PixArtSigmaPipeline"
SNR_LIMIT = 5.0
SIZE_LIMIT = 20_000_000
SHAPE = ("layers", "heads", "head_size", "patch", "batch", "coloured", "collages", "seed")


@dataclass(frozen=True, kw_only=True)
class TransformerTraining(DenoiserTraining):
    """Settings of one training run: those of `DenoiserTraining`, and its shape.

    `iterations` is the end of the run in steps, those of the run that it goes on from included.

    Attributes:
        cool_down: In place of `minutes` or `iterations`: steps from the checkpoint on, in which
            the learning rate falls to 0.
        resume: Go on from `OUT.checkpoint` where there is one.
        bf16: Multiply matrices in bfloat16, where the processor is faster at it; weights, sums and
            the loss stay fp32.
        layers: Transformer blocks.
        heads: Attention heads of `head_size` channels each; together they are the width.
        patch: Side of the latent patch that is one token.
    """

    cool_down: int | None = None
    resume: bool = False
    bf16: bool = False
    layers: int = 14
    heads: int = 3
    head_size: int = 56
    patch: int = 2
    batch: int = 32
    lr: float = 8e-4
    ema: float = 0.9995
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        check_settings(
            self,
            positive=("layers", "heads", "head_size", "patch", "batch", "lr", "checkpoint_minutes"),
            at_least_zero=("coloured", "collages", "seed", "threads"),
            lengths=(*LENGTHS, "cool_down"),
        )
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Every distinct caption through the text encoder, and which example has which."""

    states: Tensor  # [P, L, C] fp32
    mask: Tensor  # [P, L] fp32: 1 for a token of the caption, 0 for padding
    index: Tensor  # [N] int64, into P
    empty: int  # the row of P that is the empty caption


def train_transformer(
    settings: TransformerTraining, progress: Progress | None = None
) -> TrainingResult:
    """Trains, and saves the averaged weights to `settings.out` now and then and at the end.

    Args:
        settings: See `TransformerTraining`.
        progress: Called after each iteration with (iterations, share done, loss, learning rate).

    Raises:
        UserError: The data, init or output folder or the checkpoint cannot be used; the message
            says what to do.
    """
    start = time.monotonic()
    init, out = init_folder(settings.init), Path(settings.out)
    check_folders(init, out)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    checkpoint = _checkpoint(settings, out, generator)
    seed_all(settings.seed, settings.threads)
    examples, said = load_examples(settings, init)
    data = encode(init, examples, SHARES)
    captions = encode_captions(load_text_encoder(init), data)
    model = build_transformer(settings, data.latents.shape[1:], captions.states.shape[2])
    average = Average(list(model.parameters()), settings.ema)
    alphas = load_alphas(init)
    losses: list[float] = []

    def save() -> None:
        card = model_card(settings, model, losses, len(said))
        models = {"transformer": model}
        index = pipeline_index(init, PIPELINE, models)
        with average.swapped_in():
            save_pipeline(
                init, out, models, said, card, configs=models, index=index, limit=SIZE_LIMIT
            )

    def loss() -> Tensor:
        return denoising_loss(
            model, data, captions, alphas, settings.batch, generator, bf16=settings.bf16
        )

    steps = _steps(settings, start, average, loss, losses, progress, checkpoint)
    run_saving(steps, settings.checkpoint_minutes, save)
    seconds = time.monotonic() - start
    return TrainingResult(out=out, seconds=seconds, losses=losses, captions=said)


def _checkpoint(settings: TransformerTraining, out: Path, generator: torch.Generator) -> Checkpoint:
    """The file this run is kept in, and what it goes on from."""
    kept = out.with_name(f"{out.name}.checkpoint")
    common = {name: getattr(settings, name) for name in SHAPE}
    resumed = None
    if settings.cool_down is not None:
        resumed, begin = _cooled_from(kept, common)
        common["cooling"] = [begin, begin + settings.cool_down]
        kept = out.with_name(f"{out.name}.cooling")
        if settings.resume and kept.exists():
            resumed = read_checkpoint(kept, common)
    else:
        resumed = resume_from(kept, common, settings.resume)
    return Checkpoint(
        path=kept,
        settings=common,
        generator=generator,
        minutes=settings.checkpoint_minutes,
        resumed=resumed,
    )


def _cooled_from(kept: Path, common: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The state that a cool-down begins with, its average begun anew, and its iterations."""
    if not kept.exists():
        raise UserError(f"{kept}: no such file; there is no run whose rate could cool down")
    state = read_checkpoint(kept, common)
    state["average"] |= {"steps": 0, "shadow": state["average"]["parameters"]}
    return state, len(state["losses"])


def _steps(
    settings: TransformerTraining,
    start: float,
    average: Average,
    loss: Callable[[], Tensor],
    losses: list[float],
    progress: Progress | None,
    checkpoint: Checkpoint,
) -> Iterator[float]:
    """`optimise` at a constant rate, or at the falling one of a cool-down."""
    schedule: Schedule = constant
    if settings.cool_down is not None:
        begin, stop = checkpoint.settings["cooling"]
        settings = replace(settings, cool_down=None, iterations=stop)
        schedule = cooling(begin, stop)
    return optimise(
        settings, start, average, loss, losses, progress, schedule=schedule, checkpoint=checkpoint
    )


def build_transformer(
    settings: TransformerTraining,
    latent: Sequence[int],  # 4, h, w
    text_width: int,
) -> Any:
    """A `PixArtTransformer2DModel` that predicts the noise, with fresh weights.

    Every block begins close to the identity, with nothing from its cross-attention, and the model
    predicts 0.
    """
    from diffusers import PixArtTransformer2DModel

    model: Any = PixArtTransformer2DModel(
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_size,
        in_channels=latent[0],
        out_channels=latent[0],
        num_layers=settings.layers,
        cross_attention_dim=settings.heads * settings.head_size,
        sample_size=latent[1],
        patch_size=settings.patch,
        caption_channels=text_width,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for linear in _embedders(model):
        nn.init.normal_(linear.weight, std=0.02)
    for linear in (model.proj_out, *(b.attn2.to_out[0] for b in model.transformer_blocks)):
        nn.init.zeros_(linear.weight)
    return model.train()


def _embedders(model: Any) -> list[nn.Linear]:
    """The layers through which the time reaches the blocks."""
    time_embedder = model.adaln_single.emb.timestep_embedder
    return [time_embedder.linear_1, time_embedder.linear_2, model.adaln_single.linear]


@torch.no_grad()
def encode_captions(text: nn.Module, data: Encoded) -> Captions:
    """Runs the frozen text encoder once over every caption, as the pipeline does: padding masked.

    Padding is the end token again, so a caption ends with the first of them.
    """
    tokens, index = torch.cat([data.tokens, data.empty[None]]).unique(dim=0, return_inverse=True)
    ends = tokens == data.empty[-1]  # [P, L]
    mask = (ends.cumsum(1) - ends.long() == 0).long()  # [P, L]
    length = int(mask.sum(1).max())
    tokens, mask = tokens[:, :length], mask[:, :length]
    states = [
        text(some, attention_mask=kept)[0]
        for some, kept in zip(tokens.split(256), mask.split(256), strict=True)
    ]
    return Captions(
        states=torch.cat(states), mask=mask.float(), index=index[:-1], empty=int(index[-1])
    )


def denoising_loss(
    model: nn.Module,
    data: Encoded,
    captions: Captions,
    alphas: Tensor,  # [T] fp32: cumulative products abar_t
    batch: int,
    generator: torch.Generator,
    *,
    bf16: bool = False,
) -> Tensor:  # []
    """One batch of the loss above."""
    drawn = draw(data, alphas, batch, generator)
    row = torch.where(drawn.dropped[:, 0], captions.empty, captions.index[drawn.rows])  # [batch]
    mask = captions.mask[row]  # [batch, L]
    length = int(mask.sum(1).max())
    with torch.autocast(drawn.x.device.type, torch.bfloat16, enabled=bf16):
        predicted = model(
            drawn.x,
            captions.states[row, :length],
            timestep=drawn.t,
            encoder_attention_mask=mask[:, :length],
        ).sample.float()  # [batch, 4, h, w]
    snr = alphas[drawn.t] / (1 - alphas[drawn.t])  # [batch]
    weight = snr.clamp(max=SNR_LIMIT) / snr
    return (weight * (predicted - drawn.noise).square().mean((1, 2, 3))).mean()


def model_card(
    settings: TransformerTraining, model: nn.Module, losses: list[float], captions: int
) -> str:
    """The README of the folder: what it was trained on and how, attributions included."""
    width = settings.heads * settings.head_size
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    cooled = f", then to 0 over {settings.cool_down} iterations" if settings.cool_down else ""
    source = init_folder(settings.init).name
    return f"""# emoji-dit: a small, real PixArt pipeline

Text to 64x64 emoji by a diffusion transformer, written by `sidestep train emoji-dit`. Load it with
`PixArtSigmaPipeline.from_pretrained(folder)`; call it with `use_resolution_binning=False` (its
pictures are smaller than any of PixArt's resolutions) and `max_sequence_length=24` (all that its
text encoder takes).

- Transformer: `PixArtTransformer2DModel`, {settings.layers} blocks of width {width}
  ({settings.heads} heads), {settings.patch}x{settings.patch} latents a token, cross-attention to
  the text, {millions:.2f} M parameters; it predicts the noise. VAE, text encoder, tokenizer and
  scheduler are those of `{source}`.
{data_card(settings, captions)}
- Recipe: noise MSE weighted by min(SNR, {SNR_LIMIT:g}) / SNR, 10 % of captions dropped, AdamW
  (weight decay 0.01, rate {settings.lr:g}{cooled}), gradient norm 1, batch {settings.batch}, EMA of
  at most {settings.ema}, seed {settings.seed}, {"bf16 autocast" if settings.bf16 else "fp32"}.
{progress_card(losses)}
"""
