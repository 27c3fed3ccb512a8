"""`Adaptive()` itself on a pipeline: what it computes, and that nothing of it is stale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipelines import CountRows, generate, marks, tiny_sd

from sidestep.adapters.enable import enable
from sidestep.runtime.methods.adaptive import Adaptive

STEPS = 20


def test_it_is_near_the_plain_run_and_calls_what_it_says(sd: StableDiffusionPipeline) -> None:
    plain = generate(sd, [1, 2], STEPS)
    counted = CountRows(sd)
    with enable(sd, Adaptive()) as handle:
        ours = generate(sd, [1, 2], STEPS)
        summary = handle.summary()
    assert all(STEPS / 4 < nfe < STEPS - 3 for nfe in summary.nfe)
    assert sum(counted.rows) == 2 * sum(summary.nfe) and len(counted.rows) == summary.ticks
    assert all(row[:2] == (True,) * 2 and row[-2:] == (True,) * 2 for row in summary.skip_map)
    error = (ours - plain).square().mean((1, 2, 3)).sqrt() / plain.std((1, 2, 3))
    assert 0 < float(error.min()) and float(error.max()) < 0.05
    with enable(sd, Adaptive(threshold=0)) as handle:
        assert torch.equal(generate(sd, [1, 2], STEPS), plain)
        assert "by criterion" in handle.summary().note


def test_bfloat16() -> None:
    pipe = tiny_sd().to(torch.bfloat16)
    plain = generate(pipe, [1, 2], STEPS)
    with enable(pipe, Adaptive()) as handle:
        together, shown = generate(pipe, [1, 2], STEPS), marks(handle)
        assert all("." in row for row in shown)
        assert torch.equal(generate(pipe, [1, 2], STEPS), together) and marks(handle) == shown
    assert together.dtype == torch.bfloat16 and together.isfinite().all()
    error = (together.float() - plain.float()).square().mean().sqrt() / plain.float().std()
    assert float(error) < 0.05


def test_guidance_switched_off_midway(sd: StableDiffusionPipeline) -> None:
    """After step 9 the line has no two outputs of the smaller batch, until two are computed."""

    def cut(pipe: Any, k: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if k != 9:
            return {}
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"][-2:]}

    settings: dict[str, Any] = {
        "callback_on_step_end": cut,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    plain = generate(sd, [1, 2], STEPS, **settings)
    counted = CountRows(sd)
    with enable(sd, Adaptive(threshold=1.0)) as handle:
        ours = generate(sd, [1, 2], STEPS, **settings)
        shown, reasons = marks(handle), handle.summary().reasons
    for row, why in zip(shown, reasons, strict=True):
        assert "." in row[3:10] and "." in row[12:18]
        assert row[10] == "#" and why[10] in ("criterion", "cap", "batch changed")
        assert "batch changed" in why or "no output to reuse" in why
    per_step = [sum(row[k] == "#" for row in shown) * (2 if k < 10 else 1) for k in range(STEPS)]
    assert counted.rows == [rows for rows in per_step if rows]
    error = (ours - plain).square().mean().sqrt() / plain.std()
    assert float(error) < 0.3


def test_an_exception_midway_leaves_nothing_behind(sd: StableDiffusionPipeline) -> None:
    def fail(_pipe: Any, k: int, _t: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if k == 11:
            raise KeyboardInterrupt
        return {}

    with enable(sd, Adaptive()) as handle:
        expected, shown = generate(sd, [1, 2], STEPS), marks(handle)
    with enable(sd, Adaptive()) as handle:
        with pytest.raises(KeyboardInterrupt):
            generate(sd, [3, 4, 5], STEPS, callback_on_step_end=fail)
        assert not handle._driver._generation.calls
        assert torch.equal(generate(sd, [1, 2], STEPS), expected) and marks(handle) == shown
