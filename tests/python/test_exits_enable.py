"""`EarlyExit` on pipelines of every class of the allow-list: compaction, depths, nothing stale."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_builders as build
import torch
from tiny_exits import (
    BLOCKS,
    MODELS,
    AsTold,
    CountBlocks,
    blocks_of,
    generate,
    watch_blocks,
    write_exits,
)

import sidestep
from sidestep.runtime.exits.file import load_exits
from sidestep.runtime.exits.layouts import LAYOUTS
from sidestep.runtime.exits.plan import NOT_CALLED, StaticPlan
from sidestep.runtime.exits.rules import static
from sidestep.runtime.methods.early_exit import EarlyExit

BUDGETS = {
    "DiTTransformer2DModel": {"static": 0.1, "sample": 0.1},
    "PixArtTransformer2DModel": {"static": 0.1, "sample": 0.1},
    "SD3Transformer2DModel": {"static": 0.05, "sample": 0.012},
    "FluxTransformer2DModel": {"static": 0.012, "sample": 0.012},
}
"""At which not all steps are alike, and in mode "sample" not all rows."""

BRANCHES = {"FluxTransformer2DModel": 1}  # two calls of one branch each; the others one of two


@pytest.fixture(params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(name: str) -> Any:
    return MODELS[name][0]()


def told(handle: Any, exits: Any, **settings: Any) -> AsTold:
    """The handle's exits now follow `AsTold`."""
    rule = AsTold(exits, **settings)
    handle._driver.leaving.rule = rule
    return rule


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """To what rounding becomes in six guided steps of a model with random weights."""
    return float((ours - theirs).abs().max() / theirs.abs().max()) < 3e-4


def test_every_class_of_the_allow_list_is_tested() -> None:
    assert set(MODELS) == set(LAYOUTS)


def test_rows_leave_the_batch_and_equal_each_alone(name: str, pipe: Any, tmp_path: Path) -> None:
    """The outputs agree to rounding: a matrix product's order of sums depends on its rows."""
    file = write_exits(pipe.transformer, tmp_path)
    counted = CountBlocks(pipe.transformer)
    exits = [None, 0, 1, 0]
    with sidestep.enable(pipe, EarlyExit(exits=file)) as handle:
        told(handle, exits)
        together = generate(pipe, name, [1, 2, 3, 4])
        summary = handle.summary()
        branches = BRANCHES.get(name, 2)
        rows = [branches * n for n in (4, 2, 2, 1, 1)]
        assert counted.calls == [[4 * branches] * BLOCKS] * (2 // branches) + [rows] * (
            5 * 2 // branches
        )
        depths = [BLOCKS, 1, 3, 1]
        assert summary.layers == tuple((5.0, *[float(d)] * 5) for d in depths)
        assert summary.blocks == BLOCKS and summary.mean_depth == (4 * 5 + 5 * sum(depths)) / 24
        assert "of 5 blocks a step" in str(summary)
        for i, exit in enumerate(exits):
            told(handle, [exit])
            alone = generate(pipe, name, [i + 1])
            assert close(alone[0], together[i])
        told(handle, [None] * 4)
        whole = generate(pipe, name, [1, 2, 3, 4])
    assert [close(a, b) for a, b in zip(whole, together, strict=True)] == [True, *[False] * 3]


def test_one_exit_for_all_is_bit_equal_and_costs_no_gather(
    name: str, pipe: Any, tmp_path: Path
) -> None:
    """A batch that leaves at once is never cut: the same as the blocks left out by hand."""
    file = write_exits(pipe.transformer, tmp_path)
    exits = load_exits(file)
    assert exits.translators is not None
    with sidestep.enable(pipe, EarlyExit(exits=file)) as handle:
        told(handle, [1] * 6, by_step=True)
        left = generate(pipe, name, [1, 2])
        assert handle.summary().layers == ((3.0,) * 6,) * 2

    def translate(_block: Any, _args: Any, output: Any) -> Any:
        assert exits.translators is not None
        if isinstance(output, tuple):
            return output[0], exits.translators(1, output[1])
        return exits.translators(1, output)

    model = pipe.transformer
    blocks_of(model)[2].register_forward_hook(translate)
    for attribute in ("transformer_blocks", "single_transformer_blocks"):
        if hasattr(model, attribute):
            kept = [b for b in blocks_of(model)[:3] if b in list(getattr(model, attribute))]
            setattr(model, attribute, torch.nn.ModuleList(kept))
    assert torch.equal(generate(pipe, name, [1, 2]), left)


def test_the_rest_of_earlier_calls_stands_for_the_blocks_behind_an_exit(
    name: str, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, whole, exit 1 with its rest, no call, whole, exit 0 with its rest."""
    file = write_exits(pipe.transformer, tmp_path)
    skipping = (False, False, False, True, False, False)
    leaving = StaticPlan(
        exits=(2, 2, 1, NOT_CALLED, 2, 0),
        rests=(False, False, True, False, False, True),
        damages=(0.0,) * 6,
        weights=(0.0,) * 6,
    )
    whole = replace(leaving, exits=(2, 2, 2, NOT_CALLED, 2, 2), rests=(False,) * 6)
    counted = CountBlocks(pipe.transformer)
    monkeypatch.setattr(static, "menu_plan", lambda *_, **__: leaving)
    with sidestep.enable(pipe, EarlyExit(exits=file)) as handle:
        continued = generate(pipe, name, [1, 2])
        snr = handle._driver.leaving.rule.log_snr  # type: ignore[union-attr]
        assert handle.summary().layers == ((5.0, 5.0, 3.0, 0.0, 5.0, 1.0),) * 2
        assert handle.summary().skip_map == (tuple(not skips for skips in skipping),) * 2
    calls = 2 // BRANCHES.get(name, 2)  # a step
    ran = [sum(rows > 0 for rows in call) for call in counted.calls]
    assert ran == [blocks for blocks in (5, 5, 3, 5, 1) for _ in range(calls)]

    states: list[list[torch.Tensor]] = []  # by call, after each block
    made = [0, 1, 2, 4, 5]  # steps with a call

    def rest(step: int, call: int, blocks: int) -> torch.Tensor:
        of_call = states[made.index(step) * calls + call]
        return of_call[-1] - of_call[blocks - 1]

    def head_reads(number: int, hidden: list[torch.Tensor]) -> torch.Tensor:
        step, call = made[number // calls], number % calls
        if step not in (2, 5):
            return hidden[-1]
        blocks, b, a = (3, 1, 0) if step == 2 else (1, 4, 1)
        w = (snr[step] - snr[b]) / (snr[b] - snr[a])
        newest = rest(b, call, blocks)
        return hidden[blocks - 1] + newest + w * (newest - rest(a, call, blocks))

    monkeypatch.setattr(static, "menu_plan", lambda *_, **__: whole)
    with sidestep.enable(pipe, EarlyExit(exits=file)):
        assert not close(generate(pipe, name, [1, 2]), continued)
        watch_blocks(pipe.transformer, states, head_reads)
        by_hand = generate(pipe, name, [1, 2])
    assert len(states) == 5 * calls and close(by_hand, continued)


@pytest.mark.parametrize("mode", ["static", "sample", "adadiff"])
def test_threshold_zero_is_bit_equal_and_runs_every_block(
    name: str, pipe: Any, tmp_path: Path, mode: str
) -> None:
    kind = "faithful" if mode == "adadiff" else "excess"
    file = write_exits(pipe.transformer, tmp_path, kind=kind)
    plain = generate(pipe, name, [1, 2])
    with sidestep.enable(pipe, EarlyExit(exits=file, mode=mode, threshold=0)) as handle:
        assert torch.equal(generate(pipe, name, [1, 2]), plain)
        assert handle.summary().layers == ((float(BLOCKS),) * 6,) * 2
        assert "no row left early" in handle.summary().note


def test_disable_leaves_everything_as_it_was(name: str, pipe: Any, tmp_path: Path) -> None:
    file = write_exits(pipe.transformer, tmp_path)
    plain = generate(pipe, name, [1])
    modules = list(pipe.transformer.modules())
    before = [(type(m), dict(vars(m)), dict(m.state_dict())) for m in modules]
    handle = sidestep.enable(pipe, EarlyExit(exits=file, threshold=1e9))
    generate(pipe, name, [1])
    twin = copy.deepcopy(pipe.transformer)
    assert [type(m) for m in twin.modules()] == [kind for kind, *_ in before]
    assert handle.summary().mean_depth < BLOCKS
    sidestep.disable(pipe)
    for module, (kind, attributes, _) in zip(modules, before, strict=True):
        assert type(module) is kind and vars(module) == attributes
    assert torch.equal(generate(pipe, name, [1]), plain)


@pytest.mark.parametrize("mode", ["static", "sample"])
def test_a_batch_is_what_each_prompt_is_alone(
    name: str, pipe: Any, tmp_path: Path, mode: str
) -> None:
    """The decisions too, first step and ledger included."""
    file = write_exits(pipe.transformer, tmp_path)
    method = EarlyExit(exits=file, mode=mode, threshold=BUDGETS[name][mode])
    with sidestep.enable(pipe, method) as handle:
        together = generate(pipe, name, [1, 2, 3], steps=8)
        layers = handle.summary().layers
        assert len({depth for row in layers for depth in row}) > 1
        assert len(set(layers)) == 1 if mode == "static" else len(set(layers)) > 1
        for i in range(3):
            alone = generate(pipe, name, [i + 1], steps=8)
            assert handle.summary().layers == layers[i : i + 1]
            assert close(alone[0], together[i])


def test_an_exception_leaves_nothing_behind(name: str, pipe: Any, tmp_path: Path) -> None:
    file = write_exits(pipe.transformer, tmp_path)
    method = EarlyExit(exits=file, mode="sample", threshold=0.35)
    with sidestep.enable(pipe, method):
        expected = generate(pipe, name, [1, 2])
    failing = blocks_of(pipe.transformer)[3]
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with sidestep.enable(pipe, method) as handle:
        hook, own = failing.register_forward_pre_hook(fail), handle._driver.leaving.rule  # type: ignore[union-attr]
        told(handle, [0, None])
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, name, [7, 8])
        hook.remove()
        handle._driver.leaving.rule = own  # type: ignore[union-attr]
        assert handle._driver.leaving.passage is None  # type: ignore[union-attr]
        assert torch.equal(generate(pipe, name, [1, 2]), expected)


def test_branches_of_separate_calls_follow_the_first(tmp_path: Path) -> None:
    pipe = MODELS["FluxTransformer2DModel"][0]()
    file = write_exits(pipe.transformer, tmp_path)
    counted = CountBlocks(pipe.transformer)
    with sidestep.enable(pipe, EarlyExit(exits=file, mode="sample", threshold=0.012)) as handle:
        generate(pipe, "FluxTransformer2DModel", [1, 2, 3], steps=8)
        layers = handle.summary().layers
    assert len({depth for row in layers for depth in row}) > 1
    assert counted.calls[::2] == counted.calls[1::2]


def test_what_is_between_blocks_keeps_rows_together(tmp_path: Path) -> None:
    pipe = MODELS["SD3Transformer2DModel"][0]()
    file = write_exits(pipe.transformer, tmp_path)
    plain = generate(pipe, "SD3Transformer2DModel", [1], joint_attention_kwargs={"scale": 1.0})
    with sidestep.enable(pipe, EarlyExit(exits=file, threshold=1e9)) as handle:
        kept = generate(pipe, "SD3Transformer2DModel", [1], joint_attention_kwargs={"scale": 1.0})
        assert handle.summary().layers == ((float(BLOCKS),) * 6,)
    assert torch.equal(kept, plain)


def test_reused_steps_and_early_exits_together(tmp_path: Path) -> None:
    """Rows that skip run no block; the others leave by the same rule as without them."""
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    pipe.scheduler = build.ddim()
    file = write_exits(pipe.transformer, tmp_path)
    reuse = sidestep.Adaptive(mode="paper", threshold=1e9)
    counted = CountBlocks(pipe.transformer)
    with sidestep.enable(pipe, EarlyExit(exits=file, threshold=0.3, reuse=reuse)) as handle:
        generate(pipe, "PixArtTransformer2DModel", [1, 2], steps=12)
        summary = handle.summary()
    for called, layers in zip(summary.skip_map, summary.layers, strict=True):
        assert [depth > 0 for depth in layers] == list(called)
    assert 0 < summary.nfe[0] < 12 and len(counted.calls) == summary.ticks
    assert min(d for row in summary.layers for d in row if d) < BLOCKS


def test_one_budget_for_reused_steps_and_exits(tmp_path: Path) -> None:
    """What skips have spent is not there for exits: rows go deeper than without skips."""
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    pipe.scheduler = build.ddim()
    file = write_exits(pipe.transformer, tmp_path)
    reuse = sidestep.Adaptive(mode="error-control", threshold=1.0)
    found = []
    for settings in ({}, {"reuse": reuse}):
        method = EarlyExit(exits=file, mode="sample", threshold=0.2, **settings)  # type: ignore[arg-type]
        with sidestep.enable(pipe, method) as handle:
            generate(pipe, "PixArtTransformer2DModel", [1, 2], steps=20)
            found.append(handle.summary())
            rule = handle._driver.leaving.rule  # type: ignore[union-attr]
            assert 0 < max(rule.spent.values()) <= 0.2 + 1e-12  # type: ignore[union-attr]
    without, together = found
    assert together.mean_depth < without.mean_depth
    assert {"skipped", "budget"} <= {reason for row in together.reasons for reason in row}
    with pytest.raises(ValueError, match="reuse has mode 'learned' and debt=True, whose numbers"):
        EarlyExit(exits=file, mode="sample", reuse=sidestep.Adaptive())
    undebted = sidestep.Adaptive(mode="error-control", debt=False)
    with pytest.raises(ValueError, match="mode 'error-control' and debt=False, whose numbers"):
        EarlyExit(exits=file, mode="sample", reuse=undebted)


@pytest.mark.parametrize("mode", ["static", "sample", "adadiff"])
def test_a_batch_that_changes_midway_goes_on_leaving(tmp_path: Path, mode: str) -> None:
    """What is left is planned anew; a row may have spent what any of the others has."""
    pipe = MODELS["DiTTransformer2DModel"][0]()
    kind = "faithful" if mode == "adadiff" else "excess"
    file = write_exits(pipe.transformer, tmp_path, kind=kind)
    threshold = {"static": 0.1, "sample": 0.4, "adadiff": 0.9}[mode]
    found = []
    for change in (8, 4):
        method = EarlyExit(exits=file, mode=mode, threshold=threshold)
        with sidestep.enable(pipe, method) as handle:
            step_by_step(pipe, change)
            summary = handle.summary()
            rule = handle._driver.leaving.rule  # type: ignore[union-attr]
            assert "log-SNR" not in summary.note
            found.append(summary.layers)
            if mode == "sample":
                assert rule._first + max(rule.spent.values(), default=0) <= threshold + 1e-9  # type: ignore[union-attr]
    whole, rest = found
    assert [len(row) for row in whole] == [8] * 3 and [len(row) for row in rest] == [4]
    assert min(rest[0][1:]) < BLOCKS
    if mode == "static":  # planned anew, and the first two calls are whole then
        assert rest[0][:2] == (BLOCKS, BLOCKS) and rule.rests._kept == {}  # type: ignore[union-attr]


def step_by_step(pipe: Any, change: int) -> None:
    """Eight guided steps of three latents; from step ``change`` on the first of them alone."""
    pipe.scheduler.set_timesteps(8)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for k, t in enumerate(pipe.scheduler.timesteps):
        x = x[:1] if k >= change else x
        labels = torch.tensor([1000] * len(x) + [3, 4, 5][: len(x)])
        both = torch.cat([x, x])
        with torch.no_grad():
            output = pipe.transformer(
                both, timestep=t.expand(len(both)), class_labels=labels
            ).sample[:, :4]
        uncond, cond = output.chunk(2)
        x = pipe.scheduler.step(uncond + 4 * (cond - uncond), t, x).prev_sample
