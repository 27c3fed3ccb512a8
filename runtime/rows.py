"""Rows of a model's arguments: finding the batch among them, and taking some rows of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map_only

_Tree = TypeVar("_Tree")
_SAMPLE_NAMES = ("sample", "hidden_states", "x")
_CONDITION_NAMES = ("encoder_hidden_states", "class_labels")
_CONDITION_PLACE = 2  # UNets: (sample, timestep, encoder_hidden_states)

_PACKED = re.compile("cu_seqlens")
_SHARED = re.compile("rotary|rope|freqs")
"""Arguments about places in the sequence: the same for every sample, and without a batch."""
_PLACES = re.compile("^(txt|text|img|image|latent|video|audio)_ids$")
"""Such arguments that some models have per sample, ``[batch, sequence, axes]``, and others once,
``[sequence, axes]``."""
_LISTS = re.compile("^(img_shapes|txt_seq_lens)$")
"""Arguments that are a list with one plain value for each sample."""


def find_sample(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The model's main input ``[batch, ...]``: UNets take it first, transformers by keyword.

    Returns:
        None where there is none, or where the samples are packed into one sequence.
    """
    if any(_PACKED.search(name) for name, value in kwargs.items() if value is not None):
        return None
    named = [kwargs.get(name) for name in _SAMPLE_NAMES]
    for candidate in (*args[:1], *named):
        if isinstance(candidate, Tensor) and candidate.ndim > 0:
            return candidate
    return None


def find_condition(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What tells the guidance branches apart: the embedding of the prompt, or the classes."""
    named = [kwargs.get(name) for name in _CONDITION_NAMES]
    for candidate in (*named, *args[_CONDITION_PLACE : _CONDITION_PLACE + 1]):
        if isinstance(candidate, Tensor):
            return candidate
    return None


def take_arguments(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    index: Tensor,  # [n] int64
    batch: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a model's call for some rows of its batch.

    A tensor belongs to the batch if its first dimension is as long. What sizes cannot tell, names
    do: a table of places in the sequence (rotary embeddings, Flux's ``img_ids``) may happen to have
    as many rows as the batch, and a list of plain values may be one of samples.
    """
    return take_rows(tuple(args), index, batch), _take_named(kwargs, index, batch)


def _take_named(values: Mapping[str, Any], index: Tensor, batch: int) -> dict[str, Any]:
    taken = {}
    for name, value in values.items():
        if _SHARED.search(name) or (_PLACES.search(name) and getattr(value, "ndim", 3) < 3):
            taken[name] = value
        elif _LISTS.search(name) and isinstance(value, list | tuple) and len(value) == batch:
            taken[name] = [value[i] for i in index.tolist()]
        elif type(value) is dict:
            taken[name] = _take_named(value, index, batch)
        else:
            taken[name] = take_rows(value, index, batch)
    return taken


def take_rows(
    tree: _Tree,
    index: Tensor,  # [n] int64
    batch: int,
) -> _Tree:
    """``tree`` with the rows ``index`` of every tensor ``[batch, ...]`` in it, the rest as it is.

    Lists, tuples, dictionaries and the output classes that diffusers registers are entered.
    """

    def take(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != batch:
            return tensor
        if tensor.stride(0) == 0:  # one row for all, expanded: stays so
            return tensor[:1].expand(len(index), *tensor.shape[1:])
        return tensor[index.to(tensor.device)]  # keeps channels_last, index_select does not

    return tree_map_only(Tensor, take, tree)


def by_row(
    x: Tensor,  # [copies * rows * frames, C, ...]
    output: Sequence[int] | None,
    copies: int = 1,
) -> Tensor:
    """The latents of a scheduler's batch, ``[rows, ...]``, in the layout of the model's output.

    Some video pipelines step their frames as pictures: the scheduler's batch is that of the model
    times the frames. The model's output then has one dimension more, the frames, third in a UNet's
    layout ``[batch, C, frames, ...]`` or second in ``[batch, frames, C, ...]``.

    Args:
        x: What the scheduler steps.
        output: Shape of what the model returned; it may have more channels.
        copies: Equal copies of every row, as where guidance branches are stepped too: ``[copy 0:
            all rows; copy 1: all rows; ...]``.
    """
    x = x[: len(x) // copies]
    if output is None or len(output) != x.ndim + 1 or x.ndim < 2:
        return x
    for place, channels in ((2, 1), (1, 2)):
        frames, rest = output[place], tuple(output[3:])
        fits = rest == tuple(x.shape[2:]) and output[channels] >= x.shape[1]
        if fits and len(x) % frames == 0:
            return x.unflatten(0, (-1, frames)).movedim(1, place)
    return x
