"""What only a GPU can show of the exit operators; run by test_exits_elsewhere.py."""

from __future__ import annotations

import torch
from exit_cases import Score, ScoreCase
from solver_step_cases import bits
from torch import Tensor

from sidestep import kernels

CASE = ScoreCase(B=32, N=64, D=256, k=1, dtype=torch.bfloat16)


def leave(a: Score, out: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the rows or so leave."""
    with kernels.use_backend("triton"):  # the only one that has a score for a GPU's graph
        score = kernels.exit_score(*a)
    rows = score[:, 0].contiguous()
    order, kept = kernels.exit_decide(rows, rows.flip(0))
    kernels.exit_compact_(a.hidden, out, order, kept, place)
    return score, order, kept


def test_graph_replays_equal_eager_calls(backend: str, device: str) -> None:
    if backend == "reference":
        return  # it reads on the host, which a capture forbids
    place = torch.arange(32, device=device)
    eager, captured = CASE.arguments().to(device), CASE.arguments().to(device)
    outs = [torch.zeros_like(eager.hidden) for _ in range(2)]
    leave(CASE.arguments().to(device), outs[0].clone(), place)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = leave(captured, outs[0], place)
    for _ in range(3):
        for a in (eager, captured):
            a.hidden.copy_(CASE.arguments().hidden)
        graph.replay()
        expected = leave(eager, outs[1], place)
        torch.cuda.synchronize()
        for got, wanted in zip(replayed, expected, strict=True):
            assert torch.equal(got, wanted)
        kept = int(expected[2])
        assert torch.equal(bits(captured.hidden[:kept]), bits(eager.hidden[:kept]))
        assert torch.equal(bits(outs[0]), bits(outs[1]))


def test_streams_do_not_share_scratch(backend: str, device: str) -> None:
    place = torch.arange(32, device=device)
    arguments = [CASE.arguments().to(device) for _ in range(4)]
    outs = [torch.zeros_like(a.hidden) for a in arguments]
    streams = [torch.cuda.Stream() for _ in arguments]
    torch.cuda.synchronize()
    results = []
    for stream, a, out in zip(streams, arguments, outs, strict=True):
        with torch.cuda.stream(stream):
            results.append(leave(a, out, place))
    torch.cuda.synchronize()
    for result, out in zip(results[1:], outs[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
        assert torch.equal(bits(out), bits(outs[0]))
