"""Which transformers rows may leave early, and how their blocks hand rows on: one table.

A model is here if all its blocks read and write hidden states of one width, and if between two
blocks it does nothing but hand them on. What belongs to a row is said, not guessed from sizes: a
table of rotary embeddings may happen to have as many lines as the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Blocks:
    """One list of blocks of a model, all alike.

    Attributes:
        attribute: The model's list.
        arguments: Of a block, in order.
        returns: What a block gives, which is what the next one takes: `HIDDEN` among them.
        per_row: Arguments that are the same for every block, one line for each row of the batch.
    """

    attribute: str
    arguments: tuple[str, ...]
    returns: tuple[str, ...]
    per_row: tuple[str, ...]

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    def streams(self, output: Any) -> dict[str, Tensor | None]:
        """What a block gave, by name."""
        given = output if isinstance(output, tuple) else (output,)
        return dict(zip(self.returns, given, strict=True))

    def output(self, streams: Mapping[str, Any]) -> Any:
        """What a block that gives ``streams`` returns."""
        given = tuple(streams[name] for name in self.returns)
        return given if len(given) > 1 else given[0]


@dataclass(frozen=True)
class Layout:
    """How a class of models is built.

    Attributes:
        blocks: Its lists of blocks, in the order in which they run.
        between: Arguments of the model that it uses between its blocks, or that change per row in
            a way not said here: rows that come with one stay to the last block.
    """

    blocks: tuple[Blocks, ...]
    between: tuple[str, ...]

    def of(self, model: nn.Module) -> list[tuple[Blocks, nn.Module]]:
        """Every block of the model, in order, with the list that it belongs to."""
        return [(one, block) for one in self.blocks for block in getattr(model, one.attribute)]

    def keeps_together(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call of the model with these arguments runs every row to the last block."""
        return any(kwargs.get(name) not in (None, {}) for name in self.between)


_BASIC = (
    HIDDEN, "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "timestep",
    "cross_attention_kwargs", "class_labels", "added_cond_kwargs",
)  # fmt: skip
_JOINT = (HIDDEN, "encoder_hidden_states", "temb")
_BOTH = ("encoder_hidden_states", HIDDEN)

LAYOUTS = {
    "DiTTransformer2DModel": Layout(
        (Blocks("transformer_blocks", _BASIC, (HIDDEN,), ("timestep", "class_labels")),),
        between=("cross_attention_kwargs",),
    ),
    "PixArtTransformer2DModel": Layout(
        (
            Blocks(
                "transformer_blocks",
                _BASIC,
                (HIDDEN,),
                ("attention_mask", "encoder_hidden_states", "encoder_attention_mask", "timestep"),
            ),
        ),
        between=("cross_attention_kwargs",),
    ),
    "SD3Transformer2DModel": Layout(
        (Blocks("transformer_blocks", (*_JOINT, "joint_attention_kwargs"), _BOTH, ("temb",)),),
        between=("block_controlnet_hidden_states", "joint_attention_kwargs", "skip_layers"),
    ),
    "FluxTransformer2DModel": Layout(
        tuple(
            Blocks(
                attribute,
                (*_JOINT, "image_rotary_emb", "joint_attention_kwargs"),
                _BOTH,
                ("temb",),
            )
            for attribute in ("transformer_blocks", "single_transformer_blocks")
        ),
        between=(
            "controlnet_block_samples",
            "controlnet_single_block_samples",
            "joint_attention_kwargs",
        ),
    ),
}
"""The allow-list, by class name."""


def layout_of(model: Any) -> Layout:
    """The layout of a model.

    Raises:
        ValueError: Its class is not in `LAYOUTS`; the message says why where that is known.
    """
    name = type(model).__name__
    if name in LAYOUTS:
        return LAYOUTS[name]
    known = ", ".join(LAYOUTS)
    why = (
        "a UNet's blocks differ in width, so that no row can go from one of them to the last layer"
        if "UNet" in name
        else "how its blocks hand rows on is not known"
    )
    raise ValueError(f"EarlyExit: {name}: {why}; expected one of {known}")
