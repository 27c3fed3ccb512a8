"""Pipelines under watch: what is recorded is what happened, and nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_builders as build
import tiny_cases
import torch
from tiny_exits import BLOCKS, MODELS, AsTold, generate, random_exits
from tiny_pipelines import tiny_sd

import sidestep
from sidestep.errors import UserError
from sidestep.runtime.exits.file import save_exits
from sidestep.training.exits_record import Call, Looking, Recorder

STEPS = 4
GUIDED = {
    "DiTTransformer2DModel": [4.0, -3.0],  # its conditional branch is the first
    "PixArtTransformer2DModel": [-4.0, 5.0],
    "SD3Transformer2DModel": [-4.0, 5.0],
}


def arguments(pipe: Any, name: str, prompts: list[int], guided: bool = True) -> dict[str, Any]:
    case = tiny_cases.CASES[MODELS[name][1]]
    made = {"output_type": "latent", **case.inputs(pipe, prompts, guided)}
    return {**made, "num_inference_steps": STEPS}


def whole(_step: int) -> list[int | None]:
    return [None, None]


@pytest.mark.parametrize("name", list(GUIDED))
def test_calls_and_guidance_weights(name: str) -> None:
    pipe = MODELS[name][0]()
    plain = generate(pipe, name, [1, 2], steps=STEPS)
    kinds = [type(module) for module in pipe.transformer.modules()]
    with Recorder(pipe, (1, 3, BLOCKS), dtype=None) as recorder:
        calls = recorder.run(arguments(pipe, name, [1, 2]), 2, whole, lambda _, h: h)
        assert [call.step for call in calls] == [0, 1, 2, 3]
        assert recorder.course.steps == STEPS and recorder.course.advances
        for call in calls:
            assert call.weights == pytest.approx(GUIDED[name], abs=1e-3)
            assert (call.rows, call.channels) == (2, 4)
            assert torch.equal(recorder.head(call.hidden[2], call.args, call.kwargs), call.output)
            early = recorder.head(call.hidden[0], call.args, call.kwargs)
            assert float(call.guided_error(early).detach().min()) > 0
            assert not call.guided_error(call.output).any()
    assert [type(module) for module in pipe.transformer.modules()] == kinds
    assert torch.equal(generate(pipe, name, [1, 2], steps=STEPS), plain)


@pytest.mark.parametrize("name", list(GUIDED))
def test_exits_that_are_chosen_are_those_of_enable(name: str, tmp_path: Any) -> None:
    pipe = MODELS[name][0]()
    exits = random_exits(pipe.transformer)
    assert exits.translators is not None
    save_exits(exits, tmp_path / "exits")
    choices: list[list[int | None]] = [[1, 1], [0, None], [None, 1], [None, None]]
    with Recorder(pipe, exits.after) as recorder:
        recorder.run(arguments(pipe, name, [1, 2]), 2, lambda k: choices[k], exits.translators)
        latents = recorder.latents

    class ByStepAndRow(AsTold):
        def leave(self, sight: Any) -> list[bool] | None:
            if sight.step == 0:
                return [sight.exit == 1] * len(sight.hidden)
            return [choices[sight.step][row] == sight.exit for row in sight.rows]

    with sidestep.enable(pipe, sidestep.EarlyExit(exits=tmp_path / "exits")) as handle:
        handle._driver.leaving.rule = ByStepAndRow([])  # type: ignore[union-attr]
        given = arguments(pipe, name, [1, 2])
        seen: list[torch.Tensor] = []
        step = type(pipe.scheduler).step

        def note(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(scheduler, *args, **kwargs)
            seen.append(result[0] if isinstance(result, tuple) else result.prev_sample)
            return result

        type(pipe.scheduler).step = note  # of the swapped class only
        pipe(**given)
        assert handle.summary().layers == ((3, 1, 5, 5), (3, 5, 3, 5))
    torch.testing.assert_close(seen[-1][:2], latents, rtol=1e-3, atol=1e-3)


def test_the_guided_error_by_hand() -> None:
    output = torch.zeros(4, 3, 2)
    call = Call(
        step=0, args=(), kwargs={}, hidden=[], output=output, weights=[-1.0, 2.0], channels=2,
        chosen=[None, None],
    )  # fmt: skip
    other = torch.zeros(4, 3, 2)
    other[0, 0, 0] = 3.0  # first branch of row 0
    other[2, 0, 0] = 1.0  # second branch: -3 + 2
    other[3, 1] = 1.0  # second branch of row 1, half of its elements
    other[:, 2] = 100.0  # no part of the prediction
    assert call.guided_error(other).tolist() == [0.25, 2.0]


def test_refusals() -> None:
    with pytest.raises(UserError, match="UNet2DConditionModel: a UNet's blocks differ in width"):
        Looking(tiny_sd().unet)
    pipe = MODELS["FluxTransformer2DModel"][0]()
    with Recorder(pipe, (1,)) as recorder:
        given = arguments(pipe, "FluxTransformer2DModel", [1, 2])
        with pytest.raises(UserError, match="FluxPipeline: it calls its model several times a st"):
            recorder.run(given, 2, whole, lambda _, h: h)
        single = arguments(pipe, "FluxTransformer2DModel", [1, 2], guided=False)
        calls = recorder.run(single, 2, whole, lambda _, h: h)
        assert [call.weights for call in calls] == [pytest.approx([1.0])] * STEPS
    assert type(pipe.transformer) is type(build.tiny_flux().transformer)
