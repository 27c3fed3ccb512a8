"""AdaDiff as it was published: the model is trained on together with what decides when to leave it.

Every block but the last gets an uncertainty estimation module, one linear layer on its output and
the time, and the model's own head reads every block's output (Tang et al., Sec. 3):

    u_i   = sigmoid(w_i . L_i + v_i . tau + b_i)                  one number a token
    u^_i  = tanh |g_i - eps|                                      L_u = sum_i || u_i - u^_i ||^2
    L_all = || g_L - eps ||^2 + lambda L_u + beta sum_i (1 - u_i) || g_i - eps ||^2

(`exits_losses`), with the noise eps of `emoji_sd` on the same pictures; tau embeds lambda, which is
a function of the timestep. Modules read L_i without a gradient to the model, as in the released
code. Its other deviations are switches: `batch_weights`, `mean_over_layers`, `map` (a number for
each element of the output, not for each token) and `timeless` (no v_i).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.errors import UserError
from sidestep.runtime.exits.file import Exits, save_exits
from sidestep.runtime.exits.modules import Probes, embed_time, random_probes
from sidestep.runtime.identity import model_hash, sample_weights
from sidestep.training.average import Average
from sidestep.training.checkpoint import Checkpoint, resume_from
from sidestep.training.emoji_dit import SIZE_LIMIT, Captions, encode_captions
from sidestep.training.emoji_folder import (
    Encoded,
    check_folders,
    draw,
    encode,
    init_folder,
    load_alphas,
    load_text_encoder,
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
from sidestep.training.exits_losses import AdaDiffLoss
from sidestep.training.exits_record import Looking, output_tensor
from sidestep.training.optimise import (
    Progress,
    check_settings,
    constant,
    optimise,
    run_saving,
    seed_all,
)

EXITS = "exits.safetensors"
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
SWITCHES = ("batch_weights", "mean_over_layers", "map", "timeless")
"""Deviations of the released code."""
KEPT = ("batch", "coloured", "collages", "seed", *SWITCHES)
"""What a run that goes on must have in common with the one before."""


@dataclass(frozen=True, kw_only=True)
class FaithfulTraining(DenoiserTraining):
    """Settings of one run: those of `DenoiserTraining`, from `init`, a folder of `emoji-dit`.

    Attributes:
        weigh_u: lambda.
        weigh_layers: beta.
        batch_weights: `AdaDiffLoss` has them as in the released code.
        mean_over_layers: L_u is divided by the number of layers.
        map: One number for each element of the output.
        timeless: The modules do not see the time.
        resume: Go on from `OUT.checkpoint` where there is one.
    """

    weigh_u: float = 1.0
    weigh_layers: float = 1.0
    batch_weights: bool = False
    mean_over_layers: bool = False
    map: bool = False
    timeless: bool = False
    resume: bool = False
    batch: int = 32
    lr: float = 2e-4
    ema: float = 0.9995
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        check_settings(
            self,
            positive=("batch", "lr", "checkpoint_minutes"),
            at_least_zero=("coloured", "collages", "seed", "threads", "weigh_u", "weigh_layers"),
        )
        super().__post_init__()


def train_faithful(settings: FaithfulTraining, progress: Progress | None = None) -> TrainingResult:
    """Trains, and saves model and exits to `settings.out` now and then and at the end.

    Args:
        settings: See `FaithfulTraining`.
        progress: Called after each iteration with (iterations, share done, loss, learning rate).

    Raises:
        UserError: The data, init or output folder or the checkpoint cannot be used; the message
            says what to do.
    """
    start = time.monotonic()
    init, out = init_folder(settings.init), Path(settings.out)
    check_folders(init, out, PARTS)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    kept = out.with_name(f"{out.name}.checkpoint")
    common = {name: getattr(settings, name) for name in KEPT}
    resumed = resume_from(kept, common, settings.resume)
    seed_all(settings.seed, settings.threads)
    model = _load(init)
    examples, said = load_examples(settings, init)
    data = encode(init, examples, SHARES)
    captions = encode_captions(load_text_encoder(init), data)
    looking = Looking(model)
    probes = _fresh(settings, model, len(looking.blocks) - 1)
    average = Average([*model.parameters(), *_trained(probes, settings)], settings.ema)
    alphas = load_alphas(init)
    losses: list[float] = []

    def save() -> None:
        card = model_card(settings, model, losses, len(said))
        with average.swapped_in():
            save_pipeline(init, out, {"transformer": model}, said, card, limit=SIZE_LIMIT)
            save_exits(_exits(settings, model, probes, len(losses)), out / EXITS)

    def loss() -> Tensor:
        return adadiff_loss(looking, probes, data, captions, alphas, settings, generator)

    checkpoint = Checkpoint(
        path=kept,
        settings=common,
        generator=generator,
        minutes=settings.checkpoint_minutes,
        resumed=resumed,
    )
    with looking:
        steps = optimise(
            settings, start, average, loss, losses, progress, schedule=constant,
            checkpoint=checkpoint,
        )  # fmt: skip
        run_saving(steps, settings.checkpoint_minutes, save)
    seconds = time.monotonic() - start
    return TrainingResult(out=out, seconds=seconds, losses=losses, captions=said)


def _load(init: Path) -> Any:
    """The folder's transformer in fp32.

    Raises:
        UserError: It is no PixArt, or diffusers cannot load it.
    """
    from diffusers import PixArtTransformer2DModel

    config = PixArtTransformer2DModel.load_config(init, subfolder="transformer")
    if config.get("_class_name") != "PixArtTransformer2DModel":
        raise UserError(f"{init}: its transformer is no PixArtTransformer2DModel")
    try:
        model: Any = PixArtTransformer2DModel.from_pretrained(init, subfolder="transformer")
    except (OSError, ValueError) as error:
        raise UserError(f"{init}: cannot load the transformer: {error}") from error
    return model.float().train()


def _fresh(settings: FaithfulTraining, model: Any, layers: int) -> Probes:
    """A module for each layer, as parameters; their scores begin at 1/2."""
    config = model.config
    outputs = config.patch_size**2 * config.in_channels if settings.map else 1
    width = config.num_attention_heads * config.attention_head_dim
    generator = torch.Generator().manual_seed(settings.seed)
    made = random_probes(layers, outputs, width, generator)
    return Probes(
        weight=nn.Parameter(0.02 * made.weight),
        time=nn.Parameter(made.time),
        bias=nn.Parameter(made.bias),
    )


def _trained(probes: Probes, settings: FaithfulTraining) -> list[nn.Parameter]:
    names = ("weight", "bias") if settings.timeless else ("weight", "time", "bias")
    return [getattr(probes, name) for name in names]


def adadiff_loss(
    looking: Looking,
    probes: Probes,
    data: Encoded,
    captions: Captions,
    alphas: Tensor,  # [T] fp32: cumulative products abar_t
    settings: FaithfulTraining,
    generator: torch.Generator,
) -> Tensor:  # []
    """One batch of L_all."""
    drawn = draw(data, alphas, settings.batch, generator)
    row = torch.where(drawn.dropped[:, 0], captions.empty, captions.index[drawn.rows])  # [batch]
    mask = captions.mask[row]  # [batch, L]
    length = int(mask.sum(1).max())
    inputs = (drawn.x, captions.states[row, :length])
    named = {"timestep": drawn.t, "encoder_attention_mask": mask[:, :length]}
    layers = len(looking.blocks) - 1
    output, hidden = looking.watch(range(1, layers + 1), inputs, named)
    channels, patch = drawn.x.shape[1], looking.model.config.patch_size
    simple = (output_tensor(output)[:, :channels] - drawn.noise).square().mean()
    again = tuple(torch.cat([tensor] * layers) for tensor in inputs)
    renamed = {name: torch.cat([tensor] * layers) for name, tensor in named.items()}
    heads = looking.head(torch.cat(hidden), again, renamed)[:, :channels]
    errors = heads.unflatten(0, (layers, -1)) - drawn.noise  # [layers, batch, C, h, w]
    abar = alphas[drawn.t]
    u = uncertainties(probes, torch.stack(hidden).detach(), (abar / (1 - abar)).log() / 2)
    terms = AdaDiffLoss(
        weigh_u=settings.weigh_u,
        weigh_layers=settings.weigh_layers,
        batch_weights=settings.batch_weights,
        mean_over_layers=settings.mean_over_layers,
    )(u, by_token(errors, patch))
    return simple + terms[0] + terms[1]


def uncertainties(
    probes: Probes,
    hidden: Tensor,  # [layers, batch, N, D]
    log_snr: Tensor,  # [batch]
) -> Tensor:  # [layers, batch, N, P]
    """u of every token; its mean over tokens is the score of `Probes`."""
    tau = embed_time(log_snr)  # [batch, TIME]
    timed = torch.einsum("bt,lpt->lbp", tau, probes.time)  # [layers, batch, P]
    beta = (timed + probes.bias[:, None])[:, :, None]
    return torch.sigmoid(torch.einsum("lbnd,lpd->lbnp", hidden, probes.weight) + beta)


def by_token(errors: Tensor, patch: int) -> Tensor:  # [..., C, h, w] -> [..., N, patch^2 C]
    """The elements of every token's patch, in the order of the head's outputs."""
    *lead, channels, height, width = errors.shape
    split = errors.reshape(*lead, channels, height // patch, patch, width // patch, patch)
    order = split.movedim((-4, -2, -3, -1, -5), (-5, -4, -3, -2, -1))  # h, w, p, q, C
    return order.reshape(*lead, (height // patch) * (width // patch), patch * patch * channels)


def _exits(settings: FaithfulTraining, model: Any, probes: Probes, iterations: int) -> Exits:
    layers = len(probes.weight)
    return Exits(
        kind="faithful",
        model=type(model).__name__,
        model_hash=model_hash(model),
        model_weights=sample_weights(model),
        blocks=layers + 1,
        after=tuple(range(1, layers + 1)),
        probes=probes,
        trained={name: getattr(settings, name) for name in KEPT} | {"iterations": iterations},
    )


def model_card(
    settings: FaithfulTraining, model: nn.Module, losses: Sequence[float], captions: int
) -> str:
    """The README of the folder: what it was trained on and how, attributions included."""
    switches = [name for name in SWITCHES if getattr(settings, name)]
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"""# AdaDiff of {init_folder(settings.init).name}

A PixArt pipeline trained on to be left early, written by `sidestep train exits --mode faithful`
(AdaDiff, Tang et al., ECCV 2024). Use it with `sidestep.EarlyExit(exits=".../{EXITS}")`.

- Transformer: `PixArtTransformer2DModel`, {millions:.2f} M parameters, an uncertainty module after
  every block but the last. All else is that of `{init_folder(settings.init).name}`.
{data_card(settings, captions)}
- Recipe: L_simple + {settings.weigh_u:g} L_u + {settings.weigh_layers:g} L_UAL, deviations of the
  released code: {", ".join(switches) or "none"}; AdamW (weight decay 0.01, rate {settings.lr:g}),
  gradient norm 1, batch {settings.batch}, EMA of at most {settings.ema}, seed {settings.seed},
  fp32.
{progress_card(losses)}
"""
