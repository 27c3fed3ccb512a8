"""AdaDiff's loss as a loop over layers and pictures, to compare the quick one with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidestep.runtime.exits.modules import Probes, embed_time
from sidestep.training.emoji_dit import Captions, encode_captions
from sidestep.training.emoji_folder import Encoded, draw, encode, load_alphas, load_text_encoder
from sidestep.training.emoji_run import SHARES, load_examples
from sidestep.training.exits_faithful import FaithfulTraining, _load
from sidestep.training.exits_record import Looking


def prepared(init: Path, run: FaithfulTraining) -> tuple[Any, Encoded, Captions, Tensor]:
    """Model, data, captions and noise levels of a run."""
    examples, _ = load_examples(run, init)
    data = encode(init, examples, SHARES)
    return _load(init), data, encode_captions(load_text_encoder(init), data), load_alphas(init)


def naive_loss(
    looking: Looking,
    probes: Probes,
    data: Encoded,
    captions: Captions,
    alphas: Tensor,
    run: FaithfulTraining,
) -> float:
    """L_all of the batch that a generator seeded with 5 draws."""
    drawn = draw(data, alphas, run.batch, torch.Generator().manual_seed(5))
    total = 0.0
    for b in range(run.batch):
        dropped = bool(drawn.dropped[b, 0])
        row = captions.empty if dropped else int(captions.index[drawn.rows[b]])
        one = slice(b, b + 1)
        args = (drawn.x[one], captions.states[row][None])
        kwargs = {
            "timestep": drawn.t[one],
            "encoder_attention_mask": captions.mask[row][None],
        }
        output, hidden = looking.watch((1, 2), args, kwargs)
        noise = drawn.noise[b]
        loss = float((output.sample[0] - noise).square().mean())
        abar = alphas[drawn.t[b]]
        tau = embed_time((abar / (1 - abar)).log() / 2)
        for layer in range(2):
            error = looking.head(hidden[layer], args, kwargs)[0] - noise  # [4, h, w]
            beta = probes.time[layer] @ tau + probes.bias[layer]
            u = torch.sigmoid(hidden[layer][0] @ probes.weight[layer].T + beta)  # [N, P]
            picture = unpatched(u, error.shape)
            loss += run.weigh_u * float((picture - error.abs().tanh()).square().mean())
            certain = 1 - float(u.mean())
            loss += run.weigh_layers * certain * float(error.square().mean())
        total += loss / run.batch
    return total


def unpatched(u: Tensor, shape: torch.Size) -> Tensor:  # [N, P] -> [C, h, w]
    """A number of every element: of its token, or its own."""
    channels, height, width = shape
    spread = u.expand(len(u), 4 * channels) if u.shape[1] == 1 else u
    tokens = spread.reshape(height // 2, width // 2, 2, 2, channels)
    return torch.einsum("hwpqc->chpwq", tokens).reshape(channels, height, width)
