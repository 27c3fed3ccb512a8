"""What only a GPU can show of the parareal operators; run by test_parareal_elsewhere.py."""

from __future__ import annotations

import pytest
import torch
from parareal_cases import Arguments, Case
from solver_step_cases import bits
from torch import Tensor

from sidestep import kernels

CASE = Case(D=16384, n=4, R=2)


def iterate(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Corrects again and again: the corrected boundary is the next fine result."""
    gram = kernels.difference_gram(arguments.new, arguments.old)
    residual = kernels.parareal_correct_(*arguments)
    arguments.fine.copy_(arguments.boundary)
    return gram, residual


def test_graph_replays_equal_eager_calls(backend: str, device: str) -> None:
    if backend == "reference":
        return  # it reads coefficients on the host, which a capture forbids
    eager, captured = CASE.finite(device), CASE.finite(device)
    iterate(CASE.finite(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = iterate(captured)
    for _ in range(5):
        graph.replay()
        expected = iterate(eager)
    torch.cuda.synchronize()
    assert torch.equal(bits(captured.boundary), bits(eager.boundary))
    for a, b in zip(replayed, expected, strict=True):
        assert torch.equal(bits(a), bits(b))


def test_streams_do_not_share_scratch(backend: str, device: str) -> None:
    arguments = [CASE.finite(device) for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in arguments]
    results: list[tuple[Tensor, Tensor]] = []
    torch.cuda.synchronize()
    for turn in range(10):
        for stream, mine in zip(streams, arguments, strict=True):
            with torch.cuda.stream(stream):
                found = iterate(mine)
            if turn == 9:
                results.append(found)
    torch.cuda.synchronize()
    for other, (gram, residual) in zip(arguments[1:], results[1:], strict=True):
        assert torch.equal(bits(other.boundary), bits(arguments[0].boundary))
        assert torch.equal(bits(gram), bits(results[0][0]))
        assert torch.equal(bits(residual), bits(results[0][1]))


@pytest.mark.parametrize("D", [16384, 1_000_003])
def test_a_call_allocates_its_result_alone(backend: str, device: str, D: int) -> None:
    if backend == "reference":
        return
    arguments = Case(D=D, n=2, R=2).finite(device)
    iterate(arguments)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    iterate(arguments)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 2
