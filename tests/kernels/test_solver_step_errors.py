"""What the fused step refuses: the sentence, and that nothing was touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from solver_step_cases import Arguments, Case, bits
from torch import Tensor

from sidestep import kernels
from sidestep.kernels import config

CASE = Case(D=32, rows=2, R=2, G=2)  # 4 slots, table width 13
Change = Callable[[Arguments], dict[str, Any]]


def _wider(tensor: Tensor) -> Tensor:
    """The same values in memory with a gap after each row."""
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def _shared(arguments: Arguments, name: str) -> Tensor:
    """An fp32 tensor of the argument's shape inside the memory of registers."""
    shape = arguments.tensors()[name].shape
    return arguments.registers.view(-1)[8 : 8 + shape.numel()].view(shape)


SHAPES: dict[str, tuple[Change, str]] = {
    "registers flat": (
        lambda a: {"registers": a.registers[:, 0].contiguous()},
        "solver_step: registers has shape [4, 32], expected [slots, R, D] with R in 1..6",
    ),
    "R = 7": (
        lambda a: {"registers": a.registers.new_zeros(4, 7, 32)},
        "solver_step: registers has shape [4, 7, 32], expected [slots, R, D] with R in 1..6",
    ),
    "R = 0": (
        lambda a: {"registers": a.registers.new_zeros(4, 0, 32)},
        "solver_step: registers has shape [4, 0, 32], expected [slots, R, D] with R in 1..6",
    ),
    "no branch": (
        lambda a: {"outputs": []},
        "solver_step: outputs has 0 branches, expected 1 to 3",
    ),
    "four branches": (
        lambda a: {"outputs": a.outputs * 2},
        "solver_step: outputs has 4 branches, expected 1 to 3",
    ),
    "output": (
        lambda a: {"outputs": [a.outputs[0], a.outputs[1][:, :31].contiguous()]},
        "solver_step: outputs[1] has shape [2, 31], expected [2, 32]",
    ),
    "weights": (
        lambda a: {"weights": a.weights[0]},
        "solver_step: weights has shape [2], expected [2, 2]",
    ),
    "noise": (
        lambda a: {"noise": a.noise[:1]},
        "solver_step: noise has shape [1, 32], expected [2, 32]",
    ),
    "table": (
        lambda a: {"table": a.table[:, :12].contiguous()},
        "solver_step: table has shape [6, 12], expected [6, 13]",
    ),
    "empty table": (
        lambda a: {"table": a.table[:0]},
        "solver_step: table has shape [0, 13], expected [K, 13] with K at least 1",
    ),
    "scalar step": (
        lambda a: {"step": a.step[0]},
        "solver_step: step has shape [], expected [rows]",
    ),
    "more rows than slots": (
        lambda a: {"registers": a.registers[:1]},
        "solver_step: registers has 1 slots, expected at least the 2 rows",
    ),
    "slot": (
        lambda a: {"slot": a.slot[:1]},
        "solver_step: slot has shape [1], expected [2]",
    ),
    "model_input": (
        lambda a: {"model_input": a.model_input[0]},
        "solver_step: model_input has shape [2, 32], expected [2, 2, 32]",
    ),
    "stats": (
        lambda a: {"stats": a.stats[:, 0].contiguous()},
        "solver_step: stats has shape [2], expected [2, 2]",
    ),
}
LAYOUTS: dict[str, tuple[Change, str]] = {
    "registers strided": (
        lambda a: {"registers": _wider(a.registers)},
        "solver_step: registers has strides [128, 64, 1], expected a contiguous tensor",
    ),
    "output strided": (
        lambda a: {"outputs": [_wider(a.outputs[0]), a.outputs[1]]},
        "solver_step: outputs[0] has strides [64, 1], expected a contiguous tensor",
    ),
    "weights expanded": (
        lambda a: {"weights": a.weights[:1].expand(2, 2)},
        "solver_step: weights has strides [0, 1], expected a contiguous tensor",
    ),
    "stats strided": (
        lambda a: {"stats": _wider(a.stats)},
        "solver_step: stats has strides [4, 1], expected a contiguous tensor",
    ),
    "table elsewhere": (
        lambda a: {"table": a.table.to("meta")},
        "solver_step: table is on meta, expected {device} like registers",
    ),
    "output elsewhere": (
        lambda a: {"outputs": [a.outputs[0].to("meta"), a.outputs[1]]},
        "solver_step: outputs[0] is on meta, expected {device} like registers",
    ),
}
OVERLAPS: dict[str, tuple[Change, str]] = {
    "noise in registers": (
        lambda a: {"noise": _shared(a, "noise")},
        "solver_step: registers overlaps noise in memory, expected separate tensors",
    ),
    "output in registers": (
        lambda a: {"outputs": [a.outputs[0], _shared(a, "outputs[1]")]},
        "solver_step: registers overlaps outputs[1] in memory, expected separate tensors",
    ),
    "model_input in registers": (
        lambda a: {"model_input": _shared(a, "model_input")},
        "solver_step: registers overlaps model_input in memory, expected separate tensors",
    ),
    "output in model_input": (
        lambda a: {"outputs": [a.outputs[0], a.model_input[1]]},
        "solver_step: model_input overlaps outputs[1] in memory, expected separate tensors",
    ),
    "stats are weights": (
        lambda a: {"weights": a.stats},
        "solver_step: stats overlaps weights in memory, expected separate tensors",
    ),
}
DTYPES: dict[str, tuple[Change, str]] = {
    "registers": (
        lambda a: {"registers": a.registers.half()},
        "solver_step: registers has dtype torch.float16, expected torch.float32",
    ),
    "outputs": (
        lambda a: {"outputs": [o.double() for o in a.outputs]},
        "solver_step: outputs[0] has dtype torch.float64, expected float32, float16 or bfloat16",
    ),
    "mixed outputs": (
        lambda a: {"outputs": [a.outputs[0], a.outputs[1].half()]},
        "solver_step: outputs[1] has dtype torch.float16, expected torch.float32",
    ),
    "weights": (
        lambda a: {"weights": a.weights.double()},
        "solver_step: weights has dtype torch.float64, expected torch.float32",
    ),
    "noise": (
        lambda a: {"noise": a.noise.half()},
        "solver_step: noise has dtype torch.float16, expected torch.float32",
    ),
    "table": (
        lambda a: {"table": a.table.double()},
        "solver_step: table has dtype torch.float64, expected torch.float32",
    ),
    "step": (
        lambda a: {"step": a.step.int()},
        "solver_step: step has dtype torch.int32, expected torch.int64",
    ),
    "slot": (
        lambda a: {"slot": a.slot.int()},
        "solver_step: slot has dtype torch.int32, expected torch.int64",
    ),
    "model_input": (
        lambda a: {"model_input": a.model_input.half()},
        "solver_step: model_input has dtype torch.float16, expected torch.float32",
    ),
    "stats": (
        lambda a: {"stats": a.stats.double()},
        "solver_step: stats has dtype torch.float64, expected torch.float32",
    ),
}
VALUES: dict[str, tuple[Change, str]] = {
    "step below 0": (
        lambda a: {"step": torch.tensor([0, -1])},
        "solver_step: step[1] is -1, expected 0 <= step < 6",
    ),
    "step K": (
        lambda a: {"step": torch.tensor([6, 0])},
        "solver_step: step[0] is 6, expected 0 <= step < 6",
    ),
    "slot below 0": (
        lambda a: {"slot": torch.tensor([-1, 0])},
        "solver_step: slot[0] is -1, expected 0 <= slot < 4",
    ),
    "slot too large": (
        lambda a: {"slot": torch.tensor([0, 4])},
        "solver_step: slot[1] is 4, expected 0 <= slot < 4",
    ),
}


def assert_refused(arguments: Arguments, error: type[Exception], sentence: str) -> None:
    real = {n: t for n, t in arguments.tensors().items() if t.device.type != "meta"}
    before = {name: _memory(tensor).clone() for name, tensor in real.items()}
    with pytest.raises(error) as caught:
        kernels.solver_step(*arguments)
    assert str(caught.value) == sentence
    for name, tensor in real.items():
        assert torch.equal(_memory(tensor), before[name]), name


def _memory(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _parameters(*tables: dict[str, tuple[Change, str]]) -> list[Any]:
    return [pytest.param(*value, id=name) for table in tables for name, value in table.items()]


@pytest.mark.parametrize(("change", "sentence"), _parameters(SHAPES, LAYOUTS, OVERLAPS))
def test_refuses_wrong_shapes_layouts_and_overlaps(
    backend: str, device: str, change: Change, sentence: str
) -> None:
    arguments = CASE.arguments().copy(device)
    arguments = arguments._replace(**change(arguments))
    assert_refused(arguments, ValueError, sentence.replace("{device}", str(arguments.step.device)))


@pytest.mark.parametrize(("change", "sentence"), _parameters(DTYPES))
def test_refuses_wrong_dtypes(backend: str, device: str, change: Change, sentence: str) -> None:
    arguments = CASE.arguments().copy(device)
    assert_refused(arguments._replace(**change(arguments)), TypeError, sentence)


@pytest.mark.parametrize(("change", "sentence"), _parameters(VALUES))
def test_values_out_of_range(backend: str, device: str, change: Change, sentence: str) -> None:
    """Refused on the CPU; a GPU kernel leaves such a row alone and makes its stats NaN."""
    arguments = CASE.arguments()
    changed = change(arguments)
    arguments = arguments._replace(**changed)
    if device == "cpu" and backend != "triton":
        assert_refused(arguments, ValueError, sentence)
        return
    got = arguments.copy(device)
    kernels.solver_step(*got)
    (name,) = changed
    row = int(sentence.split("[")[1][0])
    other = 1 - row
    if name == "step":
        owned = int(arguments.slot[row])
        assert torch.equal(bits(got.registers[owned]), bits(arguments.registers[owned]))
    assert got.model_input[:, row].isnan().all() and got.stats[row].isnan().all()
    assert got.model_input[:, other].isfinite().all() and got.stats[other].isfinite().all()


def test_refuses_a_slot_given_twice(backend: str, device: str) -> None:
    arguments = CASE.arguments()._replace(slot=torch.tensor([3, 3]))
    if device == "cpu" and backend != "triton":
        sentence = "solver_step: slot holds 3 twice, expected one row per slot"
        assert_refused(arguments, ValueError, sentence)


def test_arguments_that_are_only_read_may_share_memory(backend: str, device: str) -> None:
    arguments = CASE.arguments().copy(device)
    shared = arguments._replace(outputs=[arguments.outputs[1]] * 2)
    apart = arguments.copy()._replace(outputs=[arguments.outputs[1], arguments.outputs[1].clone()])
    kernels.solver_step(*shared)
    kernels.solver_step(*apart)
    assert torch.equal(bits(shared.registers), bits(apart.registers))


def test_neighbouring_memory_is_not_an_overlap(backend: str, device: str) -> None:
    arguments = CASE.arguments().copy(device)
    registers, noise = arguments.registers, arguments.noise
    memory = torch.cat([registers.view(-1), noise.view(-1)])
    adjacent = arguments.copy()._replace(
        registers=memory[: registers.numel()].view_as(registers),
        noise=memory[registers.numel() :].view_as(noise),
    )
    kernels.solver_step(*adjacent)
    kernels.solver_step(*arguments)
    assert torch.equal(bits(adjacent.registers), bits(arguments.registers))


def test_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_chosen", None)
    monkeypatch.setenv("SIDESTEP_KERNELS", "fast")
    sentence = "SIDESTEP_KERNELS is 'fast', expected one of auto, native, triton, reference"
    assert_refused(CASE.arguments(), ValueError, sentence)


def test_environment_picks_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_chosen", None)
    monkeypatch.setenv("SIDESTEP_KERNELS", "reference")
    assert config.backend() == "reference"
    with kernels.use_backend("native"):
        assert config.backend() == "native"
    assert config.backend() == "reference"
