"""Pipelines from recorded CUDA graphs: the eager driver's pictures, prompt after prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_trajectory import assert_same
from tiny_cases import CASES, run
from tiny_graphs import counts, elementwise, graphed
from tiny_pipelines import generate
from torch import Tensor

from sidestep import SRDS, Adaptive, enable
from sidestep.adapters.trajectory_graphs import sizes

EXACT = SRDS(exact=True, blocks=3)
METHODS = {
    "serial": None,
    "adaptive": Adaptive(mode="paper", threshold=0.05),
    "srds": SRDS(blocks=5, tolerance=1e-3),
    "long blocks": SRDS(blocks=(0, 8, 16), max_iterations=2, tolerance=0),
    "narrow": SRDS(exact=True, width=2),
}
CHAINED = {"serial": 4, "long blocks": 4, "srds": 2}
DIFFERENT = (  # ways in which a pipeline calls its networks
    "StableDiffusionXL", "StableDiffusion3", "Flux", "PixArtSigma", "DiT", "I2VGenXL", "Wan 2.2",
    "ControlNet", "IP-Adapter", "inpaint, 9 channels",
)  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_pipelines(name: str) -> None:
    case = CASES[name]
    made: dict[bool, list[tuple[Tensor, int]]] = {}
    for recorded in (False, True):
        pipe, made[recorded] = case.build(), []
        with enable(pipe, EXACT) as handle:
            if recorded:
                graphed(handle)
            for prompts in ([1, 2], [3, 4]):
                result = run(case, pipe, prompts, steps=6)
                made[recorded].append((result, handle.summary().ticks))
            if recorded:
                assert counts(handle)[1] >= 5  # most of the ticks
    for (graphs, ticks), (eager, calls) in zip(made[True], made[False], strict=True):
        assert_same(graphs, eager)
        assert ticks == calls
    assert not torch.allclose(made[True][0][0], made[True][1][0])


def test_embeddings_that_the_caller_writes_to_are_read_again() -> None:
    """Flux hands the caller's own tensors on: they are the same objects in every generation."""
    case = CASES["Flux"]
    made: dict[bool, list[Tensor]] = {}
    for recorded in (False, True):
        pipe, made[recorded] = case.build(), []
        generator = torch.Generator().manual_seed(0)
        config = pipe.transformer.config
        widths = (1, 7, config.joint_attention_dim), (1, config.pooled_projection_dim)
        embeds, pooled = (torch.randn(size, generator=generator) for size in widths)
        with enable(pipe, None, driver="whole") as handle:
            if recorded:
                graphed(handle)
            for _ in range(4):
                result = pipe(
                    prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_inference_steps=6,
                    height=32, width=32, output_type="latent",
                    generator=torch.Generator().manual_seed(1),
                ).images  # fmt: skip
                made[recorded].append(result)
                if len(made[recorded]) == 3:
                    embeds.mul_(-3)
                    pooled.mul_(-2)
            if recorded:
                assert counts(handle)[1] >= 2
    assert not torch.allclose(made[False][3], made[False][0])
    for graphs, eager in zip(made[True], made[False], strict=True):
        assert_same(graphs, eager)


@pytest.mark.parametrize("name", METHODS)
def test_prompt_after_prompt_bit_for_bit(name: str) -> None:
    method, heard = METHODS[name], []

    def made(recorded: bool) -> tuple[list[Tensor], list[Any], list[tuple[int, int]]]:
        pipe, results, summaries, counted = elementwise(), [], [], []
        with enable(pipe, method, driver="whole") as handle:
            recorder = graphed(handle) if recorded else None
            for prompts in ([1, 2], [3, 4], [5, 2], [1, 2], [1, 2]):
                results.append(generate(pipe, prompts, steps=16))
                summary = handle.summary()
                summaries.append((summary.nfe, summary.ticks, summary.skip_map, summary.errors))
                if recorder is not None:
                    counted.append(counts(handle))
            heard.append(None if recorder is None else recorder.captured)
        return results, summaries, counted

    results, summaries, counted = made(True)
    expected, same, _ = made(False)
    assert all(map(torch.equal, results, expected))
    assert summaries == same
    assert torch.equal(results[0], results[4]) and not torch.equal(results[0], results[1])
    captured = sum(c for c, _ in counted)
    assert captured == len(heard[0]) > 0
    assert counted[4][0] == 0  # all that these prompts need is there by now
    assert counted[4][1] >= summaries[4][1] // 4
    assert max(program.key.steps for program in heard[0]) == CHAINED.get(name, 1)
    assert len({program.key for program in heard[0]}) == captured  # none twice


def test_a_model_call_of_a_graph_is_padded_by_half_at_most() -> None:
    assert sizes(2, 1) == [2]
    assert sizes(1, 5) == [1, 2, 3, 4, 5]
    assert sizes(3, 21) == [3 * rows for rows in (1, 2, 3, 4, 6, 8, 12, 16, 21)]


@pytest.mark.parametrize("method", [None, EXACT], ids=["serial", "srds"])
def test_steps_whose_calls_differ(method: Any) -> None:
    """Guidance ends on the way: rows before and after share a tick, and not a graph."""

    def end_guidance(pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if k == 5:
            pipe._guidance_scale = 1.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
        return {}

    def made(recorded: bool) -> list[Tensor]:
        pipe = elementwise()
        with enable(pipe, method, driver="whole") as handle:
            recorder = graphed(handle) if recorded else None
            results = [
                generate(
                    pipe,
                    prompts,
                    steps=12,
                    callback_on_step_end=end_guidance,
                    callback_on_step_end_tensor_inputs=["prompt_embeds"],
                )
                for prompts in ([1, 2], [3, 4], [1, 2])
            ]
            if recorder is not None:
                assert counts(handle)[1] > 0
                assert len({program.key.inputs for program in recorder.captured}) == 2
        return results

    assert all(map(torch.equal, made(True), made(False)))


def test_a_third_branch_for_a_while() -> None:
    case = CASES["StableDiffusion3"]
    settings = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6, "steps": 8}
    made = []
    for recorded in (False, True):
        pipe = case.build()
        with enable(pipe, EXACT) as handle:
            if recorded:
                graphed(handle)
            made.append([run(case, pipe, prompts, **settings) for prompts in ([1, 2], [3, 4])])
            assert not recorded or counts(handle)[1] > 0
    for eager, graphs in zip(*made, strict=True):
        assert_same(graphs, eager)


def test_another_size_and_back() -> None:
    pipe, other = elementwise(), elementwise()
    wide: dict[str, Any] = {"height": 64, "width": 128}
    turns: tuple[dict[str, Any], ...] = ({}, {}, wide, wide, {}, {}, {"steps": 9})
    taken = []
    with enable(pipe, EXACT) as handle, enable(other, EXACT):
        recorder = graphed(handle)
        for settings in turns:
            given = {"steps": 6, **settings}
            assert torch.equal(generate(pipe, [1], **given), generate(other, [1], **given))
            taken.append(counts(handle)[0])
        assert taken[0] > 0 and taken[2] > 0
        assert taken[4] == taken[0]  # let go of meanwhile
        assert taken[6] == 0  # with as many blocks, other steps are the same graphs
        assert len(handle._driver.graphs._graphs) <= len(sizes(2, 4))
    assert recorder.synchronized >= 2  # nothing may run in what is freed


def test_inference_mode_in_between() -> None:
    pipe, other = elementwise(), elementwise()
    with enable(pipe, EXACT) as handle, enable(other, EXACT):
        graphed(handle)
        for prompt in (1, 2, 3, 4):
            with torch.inference_mode(prompt == 3):
                made, expected = (generate(one, [prompt], steps=6) for one in (pipe, other))
            assert torch.equal(made, expected)
        assert counts(handle)[1] > 0


def test_disable_lets_go_of_everything() -> None:
    import gc
    import weakref

    pipe = elementwise()
    with enable(pipe, EXACT) as handle:
        recorder = graphed(handle)
        generate(pipe, [1], steps=6)
        generate(pipe, [2], steps=6)
        graphs = handle._driver.graphs
        engine, static = weakref.ref(graphs._engine), weakref.ref(recorder.captured[0].weights)
        for held in (recorder.captured, recorder.warmed, recorder.pool):
            held.clear()
    gc.collect()
    assert engine() is None and static() is None
    assert counts(handle)[1] > 0  # the summary stays
