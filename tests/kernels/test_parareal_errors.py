"""What the parareal operators refuse: the sentence, and that nothing was touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parareal_cases import Arguments, Case
from solver_step_cases import bits
from torch import Tensor

from sidestep import kernels

CASE = Case(D=32, n=2, R=2)
Change = Callable[[Arguments], dict[str, Any]]

GRAM: dict[str, tuple[Change, type[Exception], str]] = {
    "flat": (
        lambda a: {"new": a.new[0]},
        ValueError,
        "new has shape [3, 32], expected [n, V, D] with V in 1..7",
    ),
    "V = 8": (
        lambda a: {"new": a.new.new_zeros(2, 8, 32)},
        ValueError,
        "new has shape [2, 8, 32], expected [n, V, D] with V in 1..7",
    ),
    "V = 0": (
        lambda a: {"new": a.new[:, :0]},
        ValueError,
        "new has shape [2, 0, 32], expected [n, V, D] with V in 1..7",
    ),
    "other shape": (
        lambda a: {"old": a.old[:, :2].contiguous()},
        ValueError,
        "old has shape [2, 2, 32], expected [2, 3, 32]",
    ),
    "new strided": (
        lambda a: {"new": torch.cat([a.new, a.new], -1)[..., :32]},
        ValueError,
        "new has strides [192, 64, 1], expected a contiguous tensor",
    ),
    "old strided": (
        lambda a: {"old": a.old[:, :1].expand(2, 3, 32)},
        ValueError,
        "old has strides [96, 0, 1], expected a contiguous tensor",
    ),
    "new in half": (
        lambda a: {"new": a.new.half()},
        TypeError,
        "new has dtype torch.float16, expected torch.float32",
    ),
    "old in double": (
        lambda a: {"old": a.old.double()},
        TypeError,
        "old has dtype torch.float64, expected torch.float32",
    ),
    "elsewhere": (
        lambda a: {"old": a.old.to("meta")},
        ValueError,
        "old is on meta, expected {device} like new",
    ),
}
CORRECT: dict[str, tuple[Change, type[Exception], str]] = {
    "flat": (
        lambda a: {"boundary": a.boundary[0]},
        ValueError,
        "boundary has shape [2, 32], expected [n, R, D] with R in 1..6",
    ),
    "R = 7": (
        lambda a: {"boundary": a.boundary.new_zeros(2, 7, 32)},
        ValueError,
        "boundary has shape [2, 7, 32], expected [n, R, D] with R in 1..6",
    ),
    "fine": (
        lambda a: {"fine": a.fine[:1]},
        ValueError,
        "fine has shape [1, 2, 32], expected [2, 2, 32]",
    ),
    "new": (
        lambda a: {"new": a.fine},
        ValueError,
        "new has shape [2, 2, 32], expected [2, 3, 32]",
    ),
    "old": (
        lambda a: {"old": a.old[..., :31].contiguous()},
        ValueError,
        "old has shape [2, 3, 31], expected [2, 3, 32]",
    ),
    "coefficients": (
        lambda a: {"coefficients": a.coefficients[0]},
        ValueError,
        "coefficients has shape [2, 3], expected [2, 2, 3]",
    ),
    "boundary strided": (
        lambda a: {"boundary": a.boundary.mT.contiguous().mT},
        ValueError,
        "boundary has strides [64, 1, 2], expected a contiguous tensor",
    ),
    "coefficients strided": (
        lambda a: {"coefficients": a.coefficients[:1].expand(2, 2, 3)},
        ValueError,
        "coefficients has strides [0, 3, 1], expected a contiguous tensor",
    ),
    "fine in half": (
        lambda a: {"fine": a.fine.half()},
        TypeError,
        "fine has dtype torch.float16, expected torch.float32",
    ),
    "coefficients in double": (
        lambda a: {"coefficients": a.coefficients.double()},
        TypeError,
        "coefficients has dtype torch.float64, expected torch.float32",
    ),
    "elsewhere": (
        lambda a: {"old": a.old.to("meta")},
        ValueError,
        "old is on meta, expected {device} like boundary",
    ),
    "fine is boundary": (
        lambda a: {"fine": a.boundary},
        ValueError,
        "boundary overlaps fine in memory, expected separate tensors",
    ),
    "boundary in new": (
        lambda a: {"boundary": a.new.view(-1)[:128].view(2, 2, 32)},
        ValueError,
        "boundary overlaps new in memory, expected separate tensors",
    ),
    "boundary in old": (
        lambda a: {"boundary": a.old.view(-1)[64:].view(2, 2, 32)},
        ValueError,
        "boundary overlaps old in memory, expected separate tensors",
    ),
    "coefficients in boundary": (
        lambda a: {"coefficients": a.boundary.view(-1)[116:].view(2, 2, 3)},
        ValueError,
        "boundary overlaps coefficients in memory, expected separate tensors",
    ),
}


def assert_refused(
    operator: Callable[..., Any], arguments: tuple[Any, ...], error: type[Exception], sentence: str
) -> None:
    real = [tensor for tensor in arguments if tensor.device.type != "meta"]
    before = [_memory(tensor).clone() for tensor in real]
    with pytest.raises(error) as caught:
        operator(*arguments)
    device = str(arguments[0].device)
    assert str(caught.value) == f"{operator.__name__}: {sentence.replace('{device}', device)}"
    for tensor, kept in zip(real, before, strict=True):
        assert torch.equal(_memory(tensor), kept)


def _memory(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _parameters(table: dict[str, tuple[Change, type[Exception], str]]) -> list[Any]:
    return [pytest.param(*value, id=name) for name, value in table.items()]


@pytest.mark.parametrize(("change", "error", "sentence"), _parameters(GRAM))
def test_gram_refuses(
    backend: str, device: str, change: Change, error: type[Exception], sentence: str
) -> None:
    arguments = CASE.arguments().copy(device)
    arguments = arguments._replace(**change(arguments))
    assert_refused(kernels.difference_gram, arguments[2:4], error, sentence)


@pytest.mark.parametrize(("change", "error", "sentence"), _parameters(CORRECT))
def test_correction_refuses(
    backend: str, device: str, change: Change, error: type[Exception], sentence: str
) -> None:
    arguments = CASE.arguments().copy(device)
    arguments = arguments._replace(**change(arguments))
    assert_refused(kernels.parareal_correct_, tuple(arguments), error, sentence)


def test_what_is_only_read_may_share_memory(backend: str, device: str) -> None:
    """A block whose input has not moved: new and old are one tensor, and fine is part of it."""
    arguments = CASE.arguments().copy(device)
    shared = arguments._replace(old=arguments.new, fine=arguments.new.view(-1)[:128].view(2, 2, 32))
    kernels.parareal_correct_(*shared)
    assert torch.equal(bits(shared.boundary), bits(shared.fine))


def test_neighbouring_memory_is_not_an_overlap(backend: str, device: str) -> None:
    """Boundaries of consecutive blocks lie in one tensor."""
    arguments = CASE.arguments().copy(device)
    memory = torch.cat([arguments.boundary.view(-1), arguments.fine.view(-1)]).view(2, 2, 2, 32)
    adjacent = arguments._replace(boundary=memory[0], fine=memory[1])
    kernels.parareal_correct_(*adjacent)
    kernels.parareal_correct_(*arguments)
    assert torch.equal(bits(adjacent.boundary), bits(arguments.boundary))
