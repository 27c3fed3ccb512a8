"""Early exits in SRDS's first iteration: its result stays what it is, and blocks are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_builders as build
import torch
from test_trajectory import assert_same
from tiny_exits import BLOCKS, MODELS, CountBlocks, generate, write_exits
from tiny_graphs import graphed
from tiny_pipelines import tiny_sd

import sidestep
from sidestep import SRDS, EarlyExit, enable

NAMES = list(MODELS)
STEPS = 12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threshold", [0.1, 1e9])
def test_all_iterations_give_the_serial_result(name: str, threshold: float, tmp_path: Path) -> None:
    """Whatever the exits; and the blocks that were left out are counted, evaluation by evaluation.

    Four blocks of three steps, first iterate: 3 evaluations of each block but the first one, of
    each prompt, in both branches.
    """
    pipe = MODELS[name][0]()
    exits = EarlyExit(exits=write_exits(pipe.transformer, tmp_path), threshold=threshold)
    plain = generate(pipe, name, [1, 2], steps=STEPS)
    counted = CountBlocks(pipe.transformer)
    made: list[list[int]] = []
    for each in (None, exits):
        counted.calls.clear()
        with enable(pipe, SRDS(exact=True, blocks=4, exits=each)) as handle:
            result = generate(pipe, name, [1, 2], steps=STEPS)
            summary = handle.summary()
        assert_same(result, plain)
        assert summary.errors == (0.0, 0.0) and summary.iterations == (4, 4)
        made.append([sum(rows) for rows in zip(*counted.calls, strict=True)])
    whole, early = made
    assert whole[0] == early[0] and len(set(whole)) == 1
    drafts = 2 * 2 * 3 * 3
    saved = sum(whole) - sum(early)
    assert 0 < saved <= drafts * (BLOCKS - 1)
    depth = (drafts * BLOCKS - saved) / drafts
    assert summary.note.startswith(f"{drafts} evaluations were drafts (guidance branches apart)")
    assert f"with {depth:.1f} of {BLOCKS} blocks" in summary.note
    if threshold == 1e9:
        assert saved == drafts * (BLOCKS - 1)


def test_threshold_zero_changes_nothing(tmp_path: Path) -> None:
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    exits = EarlyExit(exits=write_exits(pipe.transformer, tmp_path), threshold=0)
    found, settings = [], {"exact": True, "blocks": 4, "coarse": "hold"}
    for each in (None, exits):
        with enable(pipe, SRDS(exits=each, **settings)) as handle:  # type: ignore[arg-type]
            found.append(generate(pipe, "PixArtTransformer2DModel", [1], steps=STEPS))
            note = handle.summary().note
    assert torch.equal(*found)
    assert note.endswith(f"with {BLOCKS}.0 of {BLOCKS} blocks (100%)")


def test_an_early_stop_is_near_all_the_same(tmp_path: Path) -> None:
    """The tolerance holds: drafts are nothing that a picture could stop at."""
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    exits = EarlyExit(exits=write_exits(pipe.transformer, tmp_path), threshold=1e9)
    plain = generate(pipe, "PixArtTransformer2DModel", [1, 2], steps=24)
    with enable(pipe, SRDS(blocks=8, tolerance=0.05, exits=exits)) as handle:
        result = generate(pipe, "PixArtTransformer2DModel", [1, 2], steps=24)
        summary = handle.summary()
    assert min(summary.iterations) >= 2 and max(summary.iterations) < 8
    assert (result - plain).square().mean().sqrt() < 0.05


def test_disable_leaves_the_blocks_as_they_were(tmp_path: Path) -> None:
    pipe = MODELS["DiTTransformer2DModel"][0]()
    exits = EarlyExit(exits=write_exits(pipe.transformer, tmp_path), threshold=1e9)
    before = [type(module) for module in pipe.transformer.modules()]
    with enable(pipe, SRDS(blocks=3, exits=exits)) as handle:
        assert [type(module) for module in pipe.transformer.modules()] != before
        generate(pipe, "DiTTransformer2DModel", [1])
        assert handle.passage is None
    assert [type(module) for module in pipe.transformer.modules()] == before


def test_what_is_refused(tmp_path: Path) -> None:
    pipe = MODELS["DiTTransformer2DModel"][0]()
    file = write_exits(pipe.transformer, tmp_path)
    with pytest.raises(ValueError, match="exits have mode 'sample' and reuse=None, expected mode"):
        SRDS(exits=EarlyExit(exits=file, mode="sample"))
    with pytest.raises(ValueError, match="expected mode 'static' without"):
        SRDS(exits=EarlyExit(exits=file, reuse=sidestep.Adaptive()))
    with pytest.raises(ValueError, match="exits with max_iterations=1, expected 2 or more"):
        SRDS(exits=EarlyExit(exits=file), max_iterations=1)
    with pytest.raises(TypeError, match=r"exits is 'file', expected sidestep.EarlyExit"):
        SRDS(exits="file")  # type: ignore[arg-type]
    method: Any = SRDS(exits=EarlyExit(exits=file))
    with pytest.raises(ValueError, match="a UNet's blocks differ in width"):
        enable(tiny_sd(), method)
    with pytest.raises(ValueError, match="it is for another DiT"):
        enable(build.tiny_dit(BLOCKS + 1), method)


def test_no_graphs_are_captured(tmp_path: Path) -> None:
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    exits = EarlyExit(exits=write_exits(pipe.transformer, tmp_path), threshold=1e9)
    with enable(pipe, SRDS(blocks=3, exits=exits)) as handle:
        recorder = graphed(handle)
        generate(pipe, "PixArtTransformer2DModel", [1])
        assert handle.summary().graphs.startswith("none: rows leave the model early")
        assert not recorder.warmed
