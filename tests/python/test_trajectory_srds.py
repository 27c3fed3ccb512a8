"""SRDS on unmodified pipelines: with all iterations it gives what the pipeline's own loop gives."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from test_trajectory import TAKEN, assert_same, with_scheduler
from tiny_cases import CASES, run
from tiny_pipelines import generate, tiny_sd
from torch import Tensor

from sidestep import SRDS, enable

EXACT = SRDS(exact=True, blocks=3)


@pytest.mark.parametrize("name", TAKEN)
def test_all_iterations_give_the_plain_result(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    plain = run(case, pipe, [1, 2], steps=6)
    with enable(pipe, EXACT) as handle:
        parallel = run(case, pipe, [1, 2], steps=6)
    assert_same(parallel, plain)
    assert handle.summary().errors == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "settings", "eta"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 0.0),
        ("DPMSolverMultistepScheduler", {}, 0.0),
        ("UniPCMultistepScheduler", {}, 0.0),
        ("PNDMScheduler", {"skip_prk_steps": True}, 0.0),
        ("HeunDiscreteScheduler", {}, 0.0),
        ("EulerAncestralDiscreteScheduler", {}, 0.0),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0.0),
        ("DDIMScheduler", {}, 0.5),
    ],
)
def test_every_scheduler(name: str, settings: dict[str, Any], eta: float) -> None:
    pipe = with_scheduler(name, **settings)
    plain = generate(pipe, [1, 2], steps=8, eta=eta)
    with enable(pipe, EXACT):
        assert_same(generate(pipe, [1, 2], steps=8, eta=eta), plain)


def test_an_early_stop_is_near_and_takes_fewer_calls() -> None:
    pipe = tiny_sd()
    plain = generate(pipe, [1, 2], steps=24)
    seen: list[tuple[int, list[int]]] = []
    with enable(pipe, SRDS(tolerance=1e-3), on_step=lambda p, x, rows: seen.append((p, rows))) as h:
        early = generate(pipe, [1, 2], steps=24)
    summary = h.summary()
    assert summary.ticks < 24
    assert (early - plain).square().mean().sqrt() < 1e-3
    assert [p for p, _ in seen] == list(range(max(summary.iterations) + 1))
    assert seen[0] == (0, [0, 1])
    assert "sequential calls (" in str(summary)


def test_the_width_of_a_call_is_bounded_and_changes_little() -> None:
    pipe = tiny_sd()
    sizes: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with enable(pipe, SRDS(blocks=6, max_iterations=2, tolerance=0, width=2)):
        narrow = generate(pipe, [1, 2], steps=12)
    assert max(sizes) == 2 * 2 * 2  # evaluations, images, branches
    with enable(pipe, SRDS(blocks=6, max_iterations=2, tolerance=0)):
        wide = generate(pipe, [1, 2], steps=12)
    assert_same(narrow, wide)


def test_the_stepwise_driver_is_refused() -> None:
    with pytest.raises(ValueError, match="SRDS runs many steps at once, expected driver='whole'"):
        enable(tiny_sd(), SRDS(), driver="stepwise")


def test_a_scheduler_that_clips_is_refused_with_the_setting() -> None:
    pipe = tiny_sd()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    with enable(pipe, SRDS()), pytest.raises(ValueError, match="clip_sample"):
        generate(pipe, [1], steps=4)


def test_a_model_that_fails_in_the_middle_leaves_the_pipeline_as_it_was() -> None:
    pipe = tiny_sd()
    plain = generate(pipe, [1], steps=6)
    calls = 0

    def break_down(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("the model broke down")

    hook = pipe.unet.register_forward_pre_hook(break_down)
    with enable(pipe, EXACT) as handle:
        with pytest.raises(RuntimeError, match="the model broke down"):
            generate(pipe, [1], steps=6)
        hook.remove()
        assert_same(generate(pipe, [1], steps=6), plain)
        assert handle.summary().ticks == 6
