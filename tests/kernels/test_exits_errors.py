"""What the exit operators refuse: the sentence, and that nothing was touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exit_cases import MoveCase, Moves, Score, ScoreCase
from parareal_cases import surroundings_are_untouched
from test_parareal_errors import assert_refused
from torch import Tensor

from sidestep import kernels

SCORE: dict[str, tuple[Callable[[Score], dict[str, Any]], type[Exception], str]] = {
    "flat": (
        lambda a: {"hidden": a.hidden[0]},
        ValueError,
        "hidden has shape [5, 32], expected [B, N, D] with D in 1..16384",
    ),
    "no elements": (
        lambda a: {"hidden": a.hidden[..., :0]},
        ValueError,
        "hidden has shape [2, 5, 0], expected [B, N, D] with D in 1..16384",
    ),
    "hidden in double": (
        lambda a: {"hidden": a.hidden.double()},
        TypeError,
        "hidden has dtype torch.float64, expected float32, float16 or bfloat16",
    ),
    "channels first": (
        lambda a: {"hidden": a.hidden.mT.contiguous().mT},
        ValueError,
        "hidden has strides [160, 1, 5], expected a last one of 1",
    ),
    "no probes": (
        lambda a: {"probe": a.probe[:0]},
        ValueError,
        "probe has shape [0, 32], expected [k, 32] with k at least 1",
    ),
    "probe of another width": (
        lambda a: {"probe": a.probe[:, :31].contiguous()},
        ValueError,
        "probe has shape [3, 31], expected [3, 32]",
    ),
    "probe in half": (
        lambda a: {"probe": a.probe.half()},
        TypeError,
        "probe has dtype torch.float16, expected torch.float32",
    ),
    "probe strided": (
        lambda a: {"probe": a.probe.mT.contiguous().mT},
        ValueError,
        "probe has strides [1, 3], expected a contiguous tensor",
    ),
    "a bias for all rows": (
        lambda a: {"bias": a.bias[0]},
        ValueError,
        "bias has shape [3], expected [2, 3]",
    ),
    "bias elsewhere": (
        lambda a: {"bias": a.bias.to("meta")},
        ValueError,
        "bias is on meta, expected {device} like hidden",
    ),
}

DECIDE: dict[str, tuple[Callable[[Tensor], dict[str, Any]], type[Exception], str]] = {
    "scores of several probes": (
        lambda zeros: {"score": zeros[:, None]},
        ValueError,
        "score has shape [3, 1], expected [n]",
    ),
    "one limit": (
        lambda zeros: {"limit": zeros[:1]},
        ValueError,
        "limit has shape [1], expected [3]",
    ),
    "score in half": (
        lambda zeros: {"score": zeros.half()},
        TypeError,
        "score has dtype torch.float16, expected torch.float32",
    ),
    "strided": (
        lambda zeros: {"score": zeros.repeat(2)[::2]},
        ValueError,
        "score has strides [2], expected a contiguous tensor",
    ),
    "group in int32": (
        lambda zeros: {"group": zeros.int()},
        TypeError,
        "group has dtype torch.int32, expected torch.int64",
    ),
    "fewer groups": (
        lambda zeros: {"group": zeros[:2].long()},
        ValueError,
        "group has shape [2], expected [3]",
    ),
}

COMPACT: dict[str, tuple[Callable[[Moves], dict[str, Any]], type[Exception], str]] = {
    "a number": (
        lambda a: {"hidden": a.hidden.view(-1)[0]},
        ValueError,
        "hidden has shape [], expected [n, ...]",
    ),
    "hidden in double": (
        lambda a: {"hidden": a.hidden.double()},
        TypeError,
        "hidden has dtype torch.float64, expected float32, float16 or bfloat16",
    ),
    "hidden strided": (
        lambda a: {"hidden": a.hidden.mT.contiguous().mT},
        ValueError,
        "hidden has strides [129, 1, 3], expected a contiguous tensor",
    ),
    "out of another shape": (
        lambda a: {"out": a.out[:, :2].contiguous()},
        ValueError,
        "out has shape [8, 2, 43], expected [B, 3, 43]",
    ),
    "out of another dtype": (
        lambda a: {"out": a.out.half()},
        TypeError,
        "out has dtype torch.float16, expected torch.float32",
    ),
    "order in int32": (
        lambda a: {"order": a.order.int()},
        TypeError,
        "order has dtype torch.int32, expected torch.int64",
    ),
    "kept as a number": (
        lambda a: {"kept": a.kept[0]},
        ValueError,
        "kept has shape [], expected [1]",
    ),
    "fewer places": (
        lambda a: {"place": a.place[:4]},
        ValueError,
        "place has shape [4], expected [6]",
    ),
    "elsewhere": (
        lambda a: {"place": a.place.to("meta")},
        ValueError,
        "place is on meta, expected {device} like hidden",
    ),
    "out is hidden": (
        lambda a: {"out": a.hidden},
        ValueError,
        "hidden overlaps out in memory, expected separate tensors",
    ),
}

VALUES: dict[str, tuple[Callable[[Moves], None], str]] = {
    "kept below 0": (lambda a: a.kept.fill_(-1), "kept is -1, expected 0 <= kept <= 6"),
    "kept above n": (lambda a: a.kept.fill_(7), "kept is 7, expected 0 <= kept <= 6"),
    "a row that is not there": (
        lambda a: a.order[4].fill_(6),
        "order[4] is 6, expected 0 <= order < 6",
    ),
    "a row twice": (
        lambda a: a.order[5].fill_(2),
        "order holds 2 twice, expected every one once",
    ),
    "a row that need not move": (
        lambda a: a.order.copy_(torch.tensor([3, 0, 5, 1, 2, 4])),
        "order[1] is 0, expected 1 or one from kept = 3 on",
    ),
    "a place that is not there": (
        lambda a: a.place[2].fill_(8),
        "place[2] is 8, expected 0 <= place < 8",
    ),
    "a place twice": (
        lambda a: a.place[1:3].fill_(5),
        "place holds 5 twice, expected every one once",
    ),
}


def checks_values(backend: str, device: str) -> bool:
    """Whether values are checked: not on a GPU, which would have to be waited for."""
    return device == "cpu" and backend != "triton"


def parameters(table: dict[str, Any]) -> list[Any]:
    """The cases with their names."""
    return [pytest.param(*value, id=name) for name, value in table.items()]


@pytest.mark.parametrize(("change", "error", "sentence"), parameters(SCORE))
def test_score_refuses(
    backend: str,
    device: str,
    change: Callable[[Score], dict[str, Any]],
    error: type[Exception],
    sentence: str,
) -> None:
    arguments = ScoreCase(B=2, N=5, D=32, k=3).arguments().to(device)
    arguments = arguments._replace(**change(arguments))
    assert_refused(kernels.exit_score, tuple(arguments), error, sentence)


@pytest.mark.parametrize(("change", "error", "sentence"), parameters(DECIDE))
def test_decision_refuses(
    backend: str,
    device: str,
    change: Callable[[Tensor], dict[str, Any]],
    error: type[Exception],
    sentence: str,
) -> None:
    zeros = torch.zeros(3, device=device)
    given = {"score": zeros, "limit": zeros + 1, "group": zeros.long()} | change(zeros)
    assert_refused(kernels.exit_decide, tuple(given.values()), error, sentence)


@pytest.mark.parametrize(("change", "error", "sentence"), parameters(COMPACT))
def test_moves_refuse(
    backend: str,
    device: str,
    change: Callable[[Moves], dict[str, Any]],
    error: type[Exception],
    sentence: str,
) -> None:
    arguments = MoveCase((1, 2, 4), 6).arguments().copy(device)
    arguments = arguments._replace(**change(arguments))
    assert_refused(kernels.exit_compact_, tuple(arguments), error, sentence)


@pytest.mark.parametrize(("change", "sentence"), parameters(VALUES))
def test_wrong_moves_are_refused(
    backend: str, device: str, change: Callable[[Moves], None], sentence: str
) -> None:
    arguments = MoveCase((1, 2, 4), 6).arguments().copy(device)
    change(arguments)
    if checks_values(backend, device):
        assert_refused(kernels.exit_compact_, tuple(arguments), ValueError, sentence)
    elif backend != "reference":  # nothing moves to where no row is
        kernels.exit_compact_(*arguments)
        for tensor in arguments[:2]:
            assert tensor.isfinite().all() and surroundings_are_untouched(tensor)


def test_a_place_of_a_row_that_stays_is_not_looked_at(backend: str, device: str) -> None:
    arguments = MoveCase((1, 2, 4), 6).arguments().copy(device)
    arguments.place[[0, 3, 5]] = -7
    kernels.exit_compact_(*arguments)
    assert arguments.hidden[:3].isfinite().all()


def test_wrong_groups(backend: str, device: str) -> None:
    """On the CPU an error; on a GPU such a row stays."""
    score, limit = torch.zeros(3, device=device), torch.ones(3, device=device)
    group = torch.tensor([0, 3, -1], device=device)
    if checks_values(backend, device):
        sentence = "group[1] is 3, expected 0 <= group < 3"
        assert_refused(kernels.exit_decide, (score, limit, group), ValueError, sentence)
    else:
        order, kept = kernels.exit_decide(score, limit, group)
        assert order.tolist() == [2, 1, 0] and kept.item() == 2
