"""Transformers of a few blocks with exits of random weights, and rules that do as they are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_builders as build
import tiny_cases
import torch
from torch import nn

from sidestep.runtime.exits.file import Exits, Measured, save_exits
from sidestep.runtime.exits.layouts import LAYOUTS
from sidestep.runtime.exits.leaving import Rule, Sight
from sidestep.runtime.exits.modules import (
    Probes,
    Translators,
    random_probes,
    random_uncertainty,
)
from sidestep.runtime.identity import model_hash, sample_weights
from sidestep.runtime.methods.criterion import Course

BLOCKS = 5

MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "DiTTransformer2DModel": (lambda: build.tiny_dit(BLOCKS), "DiT"),
    "PixArtTransformer2DModel": (lambda: build.tiny_pixart(BLOCKS), "PixArtSigma"),
    "SD3Transformer2DModel": (lambda: build.tiny_sd3(BLOCKS), "StableDiffusion3"),
    "FluxTransformer2DModel": (lambda: build.tiny_flux(2, BLOCKS - 2), "Flux"),
}
"""Every class of the allow-list: a pipeline of it, and its case in `tiny_cases`."""


def generate(pipe: Any, name: str, prompts: Sequence[int], steps: int = 6, **more: Any) -> Any:
    """Latents (pictures of DiT) of the prompts, with guidance unless told otherwise."""
    return tiny_cases.run(tiny_cases.CASES[MODELS[name][1]], pipe, prompts, steps, **more)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for _, block in LAYOUTS[type(model).__name__].of(model)]


def width_of(model: Any) -> int:
    return int(model.config.num_attention_heads * model.config.attention_head_dim)


def random_exits(
    model: Any, after: Sequence[int] = (1, 3), kind: str = "excess", seed: int = 3, **changes: Any
) -> Exits:
    """Exits that do change what the head reads; errors fall with depth and with lambda."""
    generator = torch.Generator().manual_seed(seed)
    count, width = len(after), width_of(model)
    probes = random_probes(count, 4, width, generator)
    probes = Probes(
        weight=probes.weight,
        time=0.1 * torch.randn(probes.time.shape, generator=generator),
        bias=torch.randn(probes.bias.shape, generator=generator),
    )
    values: dict[str, Any] = {
        "kind": kind, "model": type(model).__name__, "model_hash": model_hash(model),
        "model_weights": sample_weights(model), "blocks": len(blocks_of(model)),
        "after": tuple(after), "probes": probes,
    }  # fmt: skip
    if kind == "excess":
        network = random_uncertainty(count, 4, 6, generator)
        network.outer.copy_(torch.randn(network.outer.shape, generator=generator) - 1)
        values |= {
            "translators": Translators(
                matrix=0.3 * torch.randn(count, width, width, generator=generator) / width**0.5,
                offset=0.1 * torch.randn(count, width, generator=generator),
            ),
            "uncertainty": network,
            "measured": Measured(
                log_snr=torch.linspace(-6, 4, 11),
                errors=torch.linspace(0.2, 0.02, 11) / torch.tensor(after)[:, None],
                sensitivity=torch.linspace(0.5, 1.5, 11),
                stale=torch.full((count + 1, 11), 0.02) / torch.arange(1, count + 2)[:, None],
                growth=torch.full((count + 1, 11), 1.3),
            ),
        }
    return Exits(**{**values, **changes})


def write_exits(model: Any, folder: Path, **changes: Any) -> Path:
    path = folder / "exits.safetensors"
    save_exits(random_exits(model, **changes), path)
    return path


@dataclass
class AsTold(Rule):
    """Rows leave where they are told: `exits[row]`, or all of them at `exits[step]` if by step."""

    exits: Sequence[int | None]
    by_step: bool = False
    joint: bool = True
    starts: int = 0

    def start(self, course: Course) -> None:
        self.starts += 1

    def resume(self, course: Course, steps: int) -> None:
        self.exits = self.exits[steps:] if self.by_step else self.exits

    def leave(self, sight: Sight) -> Sequence[bool] | None:
        if self.by_step:
            return [self.exits[sight.step] == sight.exit] * len(sight.hidden)
        if sight.rows is None:
            return None
        return [self.exits[row] == sight.exit for row in sight.rows]


class CountBlocks:
    """Rows that each block really runs, call after call, below all that is attached."""

    def __init__(self, model: Any) -> None:
        self.calls: list[list[int]] = []
        for index, block in enumerate(blocks_of(model)):
            block.register_forward_pre_hook(self._count(index), with_kwargs=True)

    def _count(self, index: int) -> Callable[..., None]:
        def count(_block: Any, args: Any, kwargs: Any) -> None:
            rows = len(args[0] if args else kwargs["hidden_states"])
            if index == 0:
                self.calls.append([])
            self.calls[-1].append(rows)

        return count


def watch_blocks(
    model: Any,
    states: list[list[torch.Tensor]],
    head_reads: Callable[[int, list[torch.Tensor]], torch.Tensor],
) -> None:
    """Notes the hidden states after each block, and replaces those that the head reads.

    Args:
        model: All of whose blocks run.
        states: Gets a list for every call of it.
        head_reads: What it gives of the call's number and states is read by the head.
    """
    layout = LAYOUTS[type(model).__name__].of(model)

    def note(index: int, output: Any) -> Any:
        blocks = layout[index][0]
        streams = blocks.streams(output)
        hidden = streams["hidden_states"]
        assert hidden is not None
        if index == 0:
            states.append([])
        states[-1].append(hidden.clone())
        if index < len(layout) - 1:
            return None
        return blocks.output({**streams, "hidden_states": head_reads(len(states) - 1, states[-1])})

    for index, (_, block) in enumerate(layout):
        block.register_forward_hook(lambda _m, _a, output, index=index: note(index, output))
