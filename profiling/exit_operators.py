"""The exit operators on one CPU thread beside plain torch doing the same, in one run.

`python profiling/exit_operators.py`. Shortest of 30 calls each, in turns; nothing is timed whose
results differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sidestep import _native, kernels

SIZES = ((32, 64, 256), (64, 256, 1152))  # B, N, D: a small transformer, and DiT-XL
REPEATS = 30


def microseconds(*calls: Callable[[], Any]) -> list[float]:
    """The shortest of each, taken in turns."""
    best = [float("inf")] * len(calls)
    for _ in range(REPEATS):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return [1e6 * seconds for seconds in best]


def scores(hidden: Tensor, k: int) -> list[float]:
    """`exit_score` beside layer_norm, a product, a sigmoid and a mean."""
    B, _, D = hidden.shape
    probe, bias = torch.randn(k, D) / D**0.5, torch.randn(B, k)

    def plain() -> Tensor:
        logits = functional.layer_norm(hidden.float(), (D,), eps=1e-6) @ probe.T
        return (logits + bias[:, None]).sigmoid().mean(1)

    torch.testing.assert_close(kernels.exit_score(hidden, probe, bias), plain(), rtol=0, atol=1e-5)
    return microseconds(lambda: kernels.exit_score(hidden, probe, bias), plain)


def moves(hidden: Tensor, leaving: int) -> list[float]:
    """`exit_compact_` beside index_copy_ and index_select."""
    B = len(hidden)
    score = torch.rand(B, generator=torch.Generator().manual_seed(1))
    limit = score.kthvalue(leaving).values.expand(B).contiguous()
    order, kept = kernels.exit_decide(score, limit)
    n, place = int(kept), torch.arange(B)
    out, other = torch.zeros_like(hidden), torch.zeros_like(hidden)

    def plain() -> Tensor:
        other.index_copy_(0, place[order[n:]], hidden.index_select(0, order[n:]))
        return hidden.index_select(0, order[:n])

    before = hidden.clone()
    survivors = plain()
    kernels.exit_compact_(hidden, out, order, kept, place)
    assert torch.equal(hidden[:n], survivors) and torch.equal(out, other)
    hidden.copy_(before)
    return microseconds(lambda: kernels.exit_compact_(hidden, out, order, kept, place), plain)


def in_flight(hidden: Tensor, leaving: int) -> list[float]:
    """What `Flight` does when rows leave, and one block of a transformer over those that stay.

    It gathers the rows that leave, for the translator, and those that stay, in their order; the
    block is torch's own encoder layer, which has the products of a DiT block.
    """
    B, _, D = hidden.shape
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    gone, stay = order[:leaving].sort().values, order[leaving:].sort().values
    block = nn.TransformerEncoderLayer(D, D // 64, 4 * D, 0.0, "gelu", batch_first=True).eval()
    block = block.to(hidden.dtype)
    rest = hidden[stay]
    with torch.inference_mode():
        return microseconds(lambda: (hidden[gone], hidden[stay]), lambda: block(rest))


def lines() -> Iterator[str]:
    """The table, a line at a time."""
    yield "operator | B x N x D, dtype | case | sidestep us | torch us"
    for B, N, D in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            size = f"{B} x {N} x {D}, {str(dtype)[6:]}"
            hidden = torch.randn(B, N, D).to(dtype)
            for k in (1, 8):
                ours, plain = scores(hidden, k)
                yield f"exit_score | {size} | {k} probes | {ours:.0f} | {plain:.0f}"
            for leaving in (B // 8, B // 2):
                ours, plain = moves(hidden, leaving)
                yield f"exit_compact_ | {size} | {leaving} leave | {ours:.0f} | {plain:.0f}"
            if B * N * D < 1 << 20:  # seconds a block beyond
                gathers, block = in_flight(hidden, B // 2)
                yield f"gathers of a flight | {size} | {B // 2} leave | - | {gathers:.0f}"
                yield f"one block after them | {size} | {B // 2} stay | - | {block:.0f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    _native.set_num_threads(1)
    for line in lines():
        print(line, flush=True)
