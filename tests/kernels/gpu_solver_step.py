"""What only a GPU can show of the fused step; run by test_solver_step_elsewhere.py where one is."""

from __future__ import annotations

import pytest
import torch
from solver_step_cases import STEPS, Arguments, Case, bits

from sidestep import kernels

CASE = Case(D=16384, rows=4, R=2, G=2, dtype=torch.float16)


def finite_arguments(device: str) -> Arguments:
    arguments = CASE.arguments().copy(device)
    arguments.registers.nan_to_num_(0.5)
    for tensor in (*arguments.outputs, arguments.noise):
        tensor.nan_to_num_(0.25)
    return arguments


def advance(arguments: Arguments) -> None:
    kernels.solver_step(*arguments)
    arguments.step.add_(1).remainder_(STEPS)


def test_graph_replays_equal_eager_steps(backend: str, device: str) -> None:
    if backend == "reference":
        return  # it reads steps on the host, which a capture forbids
    eager, captured = finite_arguments(device), finite_arguments(device)
    warm = finite_arguments(device)
    advance(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(captured)
    for _ in range(5):
        graph.replay()
        advance(eager)
    torch.cuda.synchronize()
    for name in ("registers", "model_input", "stats", "step"):
        a, b = getattr(eager, name), getattr(captured, name)
        assert torch.equal(bits(a), bits(b)) if a.is_floating_point() else torch.equal(a, b), name


def test_streams_do_not_share_scratch(backend: str, device: str) -> None:
    arguments = [finite_arguments(device) for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in arguments]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, mine in zip(streams, arguments, strict=True):
            with torch.cuda.stream(stream):
                advance(mine)
    torch.cuda.synchronize()
    for other in arguments[1:]:
        assert torch.equal(bits(other.registers), bits(arguments[0].registers))
        assert torch.equal(bits(other.stats), bits(arguments[0].stats))


@pytest.mark.parametrize("D", [16384, 1_000_003])
def test_a_step_allocates_nothing(backend: str, device: str, D: int) -> None:
    if backend == "reference":
        return
    arguments = Case(D=D, rows=2, R=2, G=2, dtype=torch.float16).arguments().copy(device)
    kernels.solver_step(*arguments)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        kernels.solver_step(*arguments)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
