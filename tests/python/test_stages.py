"""A pipeline's call in stages: requests that share model calls get what it would return."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_recorder import Recorder
from tiny_cases import CASES, run
from torch import Tensor

from sidestep import SRDS, Adaptive, EarlyExit, Engine, EngineLoop
from sidestep.adapters.stages import Prepared, Stages

ASKED = [((1,), 4, True), ((2, 3), 6, True), ((4,), 5, False)]  # seeds, steps, guided
WORKS = [
    "StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "PixArtSigma", "DiT",
    "LDMTextToImage", "image to image",
]  # fmt: skip
REFUSED = {
    "guidance rescaled": "weights",
    "Wan 2.2": "change from step to step",
    "inpaint, 9 channels": "reads more than latents",
    "ControlNet": "has a helper",
}


def prepare(stages: Stages, name: str, asked: Any, method: Any = None) -> Prepared:
    seeds, steps, guided = asked
    case = CASES[name]
    given = {**case.inputs(stages.pipe, seeds, guided), **case.settings}
    given = {key: value for key, value in given.items() if key not in ("generator", "output_type")}
    return stages.prepare({**given, "num_inference_steps": steps}, seeds, method=method)


def denoise(stages: Stages, prepared: list[Prepared]) -> tuple[list[Tensor], int]:
    """The latents of all requests from one engine, and the model calls."""
    first = prepared[0].request
    engine = Engine(
        first.x.shape[1:], capacity=8, buckets=range(1, 17), dtype=prepared[0].dtype, registers=6
    )
    numbers = [engine.submit(each.request) for each in prepared]
    loop, ticks = EngineLoop(engine, stages.call_model), 0
    while loop.tick():
        ticks += 1
    results = {result.id: result for result in engine.results()}
    for number in numbers:
        assert results[number].error is None, results[number].error
    return [results[number].x for number in numbers], ticks


@pytest.mark.parametrize("name", WORKS)
def test_requests_that_share_calls_get_what_the_pipeline_returns(name: str) -> None:
    pipe = CASES[name].build()
    kind = CASES[name].inputs(pipe, (1,), True).get("output_type", "latent")
    plain = [run(CASES[name], pipe, seeds, steps, guided) for seeds, steps, guided in ASKED]
    own, classes = pipe.scheduler, {key: type(part) for key, part in pipe.components.items()}
    stages = Stages(pipe)
    prepared = [prepare(stages, name, asked) for asked in ASKED]
    latents, ticks = denoise(stages, prepared)
    # a branch alone shares with two: all steps of all requests side by side
    assert ticks == max(len(each.request.plan) for each in prepared)
    for each, x, expected in zip(prepared, latents, plain, strict=True):
        given = stages.decode(each, x, kind)
        torch.testing.assert_close(torch.as_tensor(given), torch.as_tensor(expected), **CLOSE)
    stages.close()
    assert pipe.scheduler is own
    assert {key: type(part) for key, part in pipe.components.items()} == classes


CLOSE = {"rtol": 2e-4, "atol": 2e-4}  # float32 whose sums are in another order, through six steps


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shared_is_refused(name: str) -> None:
    stages = Stages(CASES[name].build())
    with pytest.raises(ValueError, match=REFUSED[name]):
        prepare(stages, name, ASKED[1])


def test_the_model_is_called_for_a_new_shape_only() -> None:
    pipe = CASES["StableDiffusion"].build()
    stages = Stages(pipe)
    calls: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda _m, args, _y: calls.append(len(args[0])))
    first = prepare(stages, "StableDiffusion", ASKED[0])
    assert calls == [2]
    prepare(stages, "StableDiffusion", ASKED[1])
    stages.decode(first, first.request.x, "latent")
    assert calls == [2]


def test_a_method_is_told_what_enable_tells_it(sd: Any) -> None:
    """The same decisions as of the whole-trajectory driver."""
    import sidestep

    method = Adaptive(mode="paper", threshold=0.5)
    with sidestep.enable(sd, method, driver="whole") as handle:
        run(CASES["StableDiffusion"], sd, [1], 12)
        expected = handle.summary()
    stages = Stages(sd)
    prepared = prepare(stages, "StableDiffusion", ((1,), 12, True), method)
    engine = Engine(prepared.request.x.shape[1:], capacity=2, buckets=(1, 2))
    engine.submit(prepared.request)
    EngineLoop(engine, stages.call_model).run()
    (result,) = engine.results()
    assert result.summary.skip_map == expected.skip_map and sum(result.nfe) < 12


def test_methods_that_mean_nothing_are_refused(sd: Any) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    stages = Stages(sd)
    with pytest.raises(TypeError, match="expected settings"):
        stages.check_method(Adaptive)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="within model calls"):
        stages.check_method(EarlyExit.__new__(EarlyExit))
    stages.check_method(SRDS())
    noisy = EulerAncestralDiscreteScheduler.from_config(sd.scheduler.config)
    given = CASES["StableDiffusion"].inputs(sd, [1], True)
    given.pop("generator", None)
    with pytest.raises(ValueError, match="adds noise at every step"):
        stages.prepare(given, [1], method=Adaptive(), scheduler=noisy)
    assert stages.prepare(given, [1], scheduler=noisy).request.noise is not None


def test_the_model_call_can_be_captured(sd: Any) -> None:
    """With graphs, as on a GPU: the same bits, from replays."""
    stages = Stages(sd)
    prepared = [prepare(stages, "StableDiffusion", ((seed,), 6, True)) for seed in (1, 2)]
    made: dict[str, list[Tensor]] = {}
    for graphs in ("off", "on"):
        engine = Engine(prepared[0].request.x.shape[1:], capacity=2, buckets=(4,))
        for each in prepared:
            engine.submit(each.request)
        loop = EngineLoop(
            engine, stages.call_model, graphs=graphs, chain=1,
            device=Recorder() if graphs == "on" else None,
        )  # fmt: skip
        loop.run()
        made[graphs] = [r.x for r in sorted(engine.results(), key=lambda result: result.id)]
    assert loop.counts["captured"] == 1 and loop.counts["replayed"] >= 4
    assert all(map(torch.equal, made["on"], made["off"]))
