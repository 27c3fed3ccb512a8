"""Pipelines on a real GPU: the pictures with CUDA graphs are those of the eager driver."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_trajectory_graphs import DIFFERENT, EXACT, METHODS
from test_trajectory_graphs_refused import Looking
from tiny_cases import CASES, run
from tiny_graphs import Elementwise, counts, elementwise
from tiny_pipelines import generate
from torch import Tensor

from sidestep import enable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
# The batch of a graph is padded, so that libraries may take other kernels for it, and every step
# builds on the rounding of the one before.
SAME = 1e-4


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32, which rounds to ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def both(method: Any, prompts: list[list[int]], **settings: Any) -> tuple[list[Tensor], Any]:
    """With graphs, after it was compared bit for bit with what is launched; and the counts."""
    made: dict[str, list[Tensor]] = {}
    for graphs in ("off", "auto"):
        pipe = elementwise().to("cuda")
        with enable(pipe, method, driver="whole", graphs=graphs) as handle:
            made[graphs], counted = [], []
            for each in prompts:
                made[graphs].append(generate(pipe, each, **settings))
                if graphs == "auto":
                    counted.append(counts(handle))
                else:
                    assert handle.summary().graphs == ""
    assert all(map(torch.equal, made["auto"], made["off"]))
    return made["auto"], counted


@pytest.mark.parametrize("name", METHODS)
def test_prompt_after_prompt_bit_for_bit(name: str) -> None:
    prompts = [[1, 2], [3, 4], [5, 2], [1, 2], [1, 2]]
    made, counted = both(METHODS[name], prompts, steps=16)
    assert made[0].is_cuda and torch.equal(made[0], made[4]) and not torch.equal(*made[:2])
    assert sum(c for c, _ in counted) > 0 and counted[4][0] == 0 and counted[4][1] > 0


@pytest.mark.parametrize("name", DIFFERENT)
def test_pipelines(name: str) -> None:
    case, made = CASES[name], []
    for graphs in ("off", "on"):
        pipe = case.build().to("cuda")
        with enable(pipe, EXACT, graphs=graphs) as handle:
            made.append([run(case, pipe, prompts, steps=6) for prompts in ([1, 2], [3, 4])])
            assert graphs == "off" or counts(handle)[1] >= 5
    for eager, graphed in zip(*made, strict=True):
        limit = SAME * max(1.0, float(eager.abs().max()))
        assert float((graphed - eager).abs().max()) <= limit


def test_a_capture_that_fails_falls_back() -> None:
    made, stream = [], torch.cuda.current_stream()
    for graphs in ("off", "auto"):
        pipe = elementwise(Looking).to("cuda")
        with enable(pipe, EXACT, graphs=graphs) as handle:
            made.append([generate(pipe, [prompt], steps=8) for prompt in (1, 2)])
            said = handle.summary().graphs
    assert all(map(torch.equal, *made))
    assert said.startswith("none: capturing a tick in a CUDA graph failed at the model call: ")
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    pipe.unet.__class__ = Elementwise  # the device can still capture
    with enable(pipe, EXACT, graphs="on") as handle:
        generate(pipe, [1], steps=8)
        assert counts(handle)[0] > 0


def test_weights_and_settings_that_change() -> None:
    pipe, other = elementwise().to("cuda"), elementwise().to("cuda")
    with enable(pipe, EXACT, graphs="on"), enable(other, EXACT, graphs="off"):
        seen = []
        for turn in range(4):
            for one in (pipe, other):
                if turn == 2:
                    one.unet.conv_in.bias.data.add_(0.5)
                if turn == 3:
                    one.unet.gain = 0.7
            results = [generate(one, [1], steps=8) for one in (pipe, other)]
            assert torch.equal(*results)
            seen.append(results[0])
    assert torch.equal(*seen[:2])
    assert not torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3])


def test_offloaded_models_are_launched() -> None:
    pytest.importorskip("accelerate")
    pipe = elementwise()
    with enable(elementwise().to("cuda"), EXACT, graphs="off") as handle:
        expected = generate(handle._pipe, [1], steps=8)
    pipe.enable_model_cpu_offload()
    with enable(pipe, EXACT) as handle:
        assert torch.equal(generate(pipe, [1], steps=8), expected)
        assert handle.summary().graphs.startswith("none: Elementwise has a hook of accelerate")


def test_memory_does_not_grow_and_is_given_back() -> None:
    pipe = elementwise().to("cuda")

    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    generate(pipe, [1], steps=8)  # libraries make their workspaces
    before, seen = allocated(), []
    with enable(pipe, EXACT, graphs="on"):
        for prompt in range(6):
            generate(pipe, [prompt], steps=8)
            seen.append(allocated())
        assert seen[-1] == seen[2]
    assert allocated() - before < 1 << 16  # indices and such that the allocator rounds up
