"""What belongs to the batch among a model's arguments, and what a scheduler's batch is made of."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from sidestep.runtime.rows import (
    by_row,
    find_condition,
    find_sample,
    take_arguments,
    take_rows,
)

BATCH = 4
INDEX = torch.tensor([3, 1])
Pair = namedtuple("Pair", "first second")


def taken(**kwargs: Any) -> dict[str, Any]:
    return take_arguments((), kwargs, INDEX, BATCH)[1]


def test_every_batch_first_tensor_is_gathered_and_nothing_else() -> None:
    one = torch.arange(4.0)
    tree = {
        "embeds": torch.arange(12.0).view(4, 3),
        "list": [one, (one, None, 3)],
        "pair": Pair(one, "text"),
        "scalar": torch.tensor(7.0),
        "other": torch.arange(5.0),
        "broadcast": torch.ones(1, 3),
    }
    rows = take_rows(tree, INDEX, BATCH)
    assert rows["embeds"].tolist() == [[9, 10, 11], [3, 4, 5]]
    assert rows["list"][0].tolist() == rows["list"][1][0].tolist() == [3, 1]
    assert rows["list"][1][1:] == (None, 3)
    assert isinstance(rows["pair"], Pair) and rows["pair"].first.tolist() == [3, 1]
    for name in ("scalar", "other", "broadcast"):
        assert rows[name] is tree[name]
    assert tree["embeds"].shape == (4, 3)


@pytest.mark.parametrize(
    "name",
    ["image_rotary_emb", "rotary_embedding", "freqs_cis", "visual_rope_pos", "text_rope_pos"],
)
def test_tables_of_places_are_shared(name: str) -> None:
    table = torch.randn(BATCH, 8)
    nested = (table, [table, table])
    assert taken(**{name: nested})[name] is nested
    assert taken(attention_kwargs={name: table})["attention_kwargs"][name] is table


@pytest.mark.parametrize("name", ["txt_ids", "img_ids"])
def test_ids_belong_to_the_batch_where_they_have_three_dimensions(name: str) -> None:
    once, each = torch.randn(BATCH, 3), torch.randn(BATCH, BATCH, 3)
    assert taken(**{name: once})[name] is once
    assert torch.equal(taken(**{name: each})[name], each[INDEX])


def test_ids_that_are_not_places_belong_to_the_batch() -> None:
    ids = torch.randn(BATCH, 3)
    assert torch.equal(taken(added_time_ids=ids)["added_time_ids"], ids[INDEX])
    inside = taken(added_cond_kwargs={"time_ids": ids})["added_cond_kwargs"]
    assert torch.equal(inside["time_ids"], ids[INDEX])


def test_lists_of_plain_values() -> None:
    shapes = [[(1, 4, n)] for n in range(BATCH)]
    rows = taken(img_shapes=shapes, skip_layers=[7, 8, 9, 10])
    assert rows == {"img_shapes": [shapes[3], shapes[1]], "skip_layers": [7, 8, 9, 10]}


def test_layouts_survive() -> None:
    """What a compiled model guards on: channels_last, and a timestep expanded over the batch."""
    pictures = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    t = torch.tensor(981).expand(BATCH)
    args, _ = take_arguments((pictures, t), {}, INDEX, BATCH)
    assert args[0].is_contiguous(memory_format=torch.channels_last)
    assert args[1].stride() == (0,) and args[1].tolist() == [981, 981]


def test_finding_the_latents_and_the_prompt() -> None:
    x, prompt = torch.zeros(2, 4), torch.zeros(2, 7, 16)
    assert find_sample((x, 3), {}) is x
    assert find_sample((), {"timestep": prompt, "hidden_states": x}) is x
    assert find_sample(([x], 3), {}) is None
    assert find_sample((torch.tensor(1.0),), {}) is None
    packed = {"hidden_states": x, "prompt_cu_seqlens": torch.arange(3)}
    assert find_sample((), packed) is None
    assert find_sample((), {**packed, "prompt_cu_seqlens": None}) is x
    assert find_condition((x, 3, prompt), {}) is prompt
    assert find_condition((x, 3), {"encoder_hidden_states": prompt}) is prompt
    assert find_condition((x,), {"class_labels": x}) is x
    assert find_condition((x, 3), {}) is None


@pytest.mark.parametrize(
    "shape, output, rows",
    [
        ((6, 4, 8, 8), (6, 4, 8, 8), (6, 4, 8, 8)),
        ((6, 4, 8, 8), (12, 8, 8, 8), (6, 4, 8, 8)),
        ((6, 4, 8, 8), (4, 4, 3, 8, 8), (2, 4, 3, 8, 8)),  # two branches of two clips
        ((6, 4, 8, 8), (2, 8, 3, 8, 8), (2, 4, 3, 8, 8)),  # a learned variance
        ((6, 4, 8, 8), (2, 3, 4, 8, 8), (2, 3, 4, 8, 8)),
        ((8, 4, 8, 8), (2, 4, 4, 8, 8), (2, 4, 4, 8, 8)),
        ((7, 4, 8, 8), (2, 4, 3, 8, 8), (7, 4, 8, 8)),  # not clips of three
        ((6, 4, 8, 8), (4, 4, 3, 9, 9), (6, 4, 8, 8)),
        ((6, 4, 8, 8), None, (6, 4, 8, 8)),
    ],
)
def test_frames_are_put_together_again(
    shape: tuple[int, ...], output: tuple[int, ...] | None, rows: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    whole = by_row(x, output)
    assert whole.shape == rows
    if len(rows) == 5:
        place = 2 if rows[1] == 4 else 1
        assert torch.equal(frames_of(whole, place), x)


def frames_of(x: Tensor, place: int) -> Tensor:
    """As the pipelines do it."""
    return x.movedim(place, 1).flatten(0, 1)


def test_copies_are_dropped() -> None:
    x = torch.randn(3, 4, 8, 8)
    assert torch.equal(by_row(torch.cat([x, x]), (6, 4, 8, 8), copies=2), x)
