"""The whole-trajectory driver gives what the pipeline's own loop gives, pipeline by pipeline."""

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from tiny_cases import CASES, run
from tiny_pipelines import CountRows, generate, marks, tiny_sd
from torch import Tensor

from sidestep import Adaptive, SidestepScheduler, enable

# The scheduler steps in the pipeline's fp32 with coefficients and terms in an order of its own, the
# engine in fp32 with those of the plan: a few roundings a step of the largest latent on the way.
SAME = 1e-5
PAPER = Adaptive(mode="paper", threshold=0.05)  # skips a third of the steps of most tiny pipelines

REFUSED = {
    "guidance rescaled": r"step 0 .* does not combine its guidance branches .*guidance_rescale",
    "inpaint, 4 channels": r"has changed the latents before step 1 \(inpainting that blends",
    "ControlNet in guess mode": (
        r"argument \['down_block_additional_residuals'\]\[0\] changes from step to step"
    ),
}
GUESSING = replace(CASES["ControlNet"], settings={"guess_mode": True})  # residuals half zero
ALL = {**CASES, "ControlNet in guess mode": GUESSING}
TAKEN = sorted(set(CASES) - set(REFUSED))


def assert_same(result: Tensor, expected: Tensor) -> None:
    error = float((result - expected).abs().max())
    largest = float(expected.abs().max())
    assert error <= SAME * max(largest, 1.0), f"{error:.2e} off, largest {largest:.3g}"


@pytest.mark.parametrize(
    ("name", "guided"),
    [(name, True) for name in TAKEN]
    + [(name, False) for name in ("StableDiffusion", "Flux", "DiT", "StableVideoDiffusion")],
)
def test_every_call_gives_the_plain_result(name: str, guided: bool) -> None:
    case = CASES[name]
    pipe = case.build()
    plain = run(case, pipe, [1, 2], steps=6, guided=guided)
    with enable(pipe, driver="whole") as handle:
        whole = run(case, pipe, [1, 2], steps=6, guided=guided)
    assert_same(whole, plain)
    summary = handle.summary()
    assert summary.nfe == (float(summary.steps),) * 2
    assert summary.ticks == summary.steps * (case.calls if guided else 1)


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, PAPER) for name in TAKEN]
    + [(name, Adaptive()) for name in ("StableDiffusion", "StableDiffusion3", "Wan 2.2")],
)
def test_a_method_skips_as_the_stepwise_driver(name: str, method: Adaptive) -> None:
    case = CASES[name]
    pipe = case.build()
    with enable(pipe, method) as handle:
        stepwise = run(case, pipe, [1, 2], steps=10)
        expected = marks(handle)
    with enable(pipe, method, driver="whole") as handle:
        whole = run(case, pipe, [1, 2], steps=10)
        assert marks(handle) == expected[:2]  # DiT steps both copies of its rows
    assert_same(whole, stepwise)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_over_is_refused(name: str) -> None:
    case = ALL[name]
    pipe = case.build()
    with enable(pipe, driver="whole") as handle:
        for _ in range(2):  # the next call begins anew
            with pytest.raises(ValueError, match=REFUSED[name] + ".* use driver='stepwise'"):
                run(case, pipe, [1, 2], steps=6)
        assert handle.summary().note == "no generation has run yet"
    after = run(case, pipe, [1, 2], steps=6)
    assert torch.equal(after, run(case, case.build(), [1, 2], steps=6))


# -- schedulers ---------------------------------------------------------------------------------

SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {"use_karras_sigmas": True},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "LMSDiscreteScheduler": {},
}


def with_scheduler(name: str, **settings: Any) -> Any:
    pipe = tiny_sd()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    return pipe


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("method", [None, PAPER], ids=["serial", "paper"])
def test_schedulers(name: str, method: Adaptive | None) -> None:
    pipe = with_scheduler(name, **SCHEDULERS[name])
    if method is None:
        expected, skips = generate(pipe, [1, 2], steps=9), None
    else:
        with enable(pipe, method) as handle:
            expected, skips = generate(pipe, [1, 2], steps=9), marks(handle)
    with enable(pipe, method, driver="whole") as handle:
        assert_same(generate(pipe, [1, 2], steps=9), expected)
        assert skips in (None, marks(handle))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"solver_order": 1}),
    ],
)
def test_the_default_method_is_told_what_the_stepwise_driver_is_told(
    name: str, settings: dict[str, Any]
) -> None:
    pipe = with_scheduler(name, **settings)
    made = []
    for driver in ("stepwise", "whole"):
        with enable(pipe, Adaptive(), driver=driver) as handle:
            latents = generate(pipe, [1, 2], steps=20)
            made.append((latents, marks(handle), handle.summary().criterion))
    (stepwise, skips, numbers), (whole, *others) = made
    assert "." in skips[0] and others[0] == skips
    # what reusing got wrong is a small difference of outputs, and feels every rounding of them
    pairs = [
        (a, b)
        for rows in zip(numbers, others[1], strict=True)
        for a, b in zip(*rows, strict=True)
        if a == a and b == b  # stepwise has a number wherever another row has one
    ]
    assert len(pairs) > 10
    assert [a for a, _ in pairs] == [pytest.approx(b, rel=0.02) for _, b in pairs]
    assert_same(whole, stepwise)


def test_our_own_scheduler() -> None:
    pipe = tiny_sd()
    pipe.scheduler = SidestepScheduler.from_config(pipe.scheduler.config, solver="unipc2")
    plain = generate(pipe, [1, 2], steps=9)
    with enable(pipe, driver="whole"):
        assert_same(generate(pipe, [1, 2], steps=9), plain)


@pytest.mark.parametrize(
    ("name", "settings", "eta"),
    [
        ("HeunDiscreteScheduler", {}, 0.0),
        ("EulerAncestralDiscreteScheduler", {}, 0.0),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0.0),
        ("DDIMScheduler", {}, 0.5),
    ],
)
def test_two_calls_a_step_and_noise_are_fine_without_a_method(
    name: str, settings: dict[str, Any], eta: float
) -> None:
    pipe = with_scheduler(name, **settings)
    plain = generate(pipe, [1, 2], steps=6, eta=eta)
    with enable(pipe, driver="whole"):
        assert_same(generate(pipe, [1, 2], steps=6, eta=eta), plain)


def test_a_method_needs_what_the_stepwise_driver_needs() -> None:
    with pytest.raises(ValueError, match=r"enable: EulerAncestralDiscreteScheduler adds noise at"):
        enable(with_scheduler("EulerAncestralDiscreteScheduler"), PAPER, driver="whole")


def test_a_scheduler_that_is_no_plan_is_refused() -> None:
    pipe = with_scheduler("DDIMScheduler", clip_sample=True)
    with (
        enable(pipe, driver="whole"),
        pytest.raises(ValueError, match="clip_sample=True clamps the predicted sample; set"),
    ):
        generate(pipe, [1])
    pipe = with_scheduler("DPMSolverSDEScheduler")
    with (
        enable(pipe, driver="whole"),
        pytest.raises(ValueError, match="DPMSolverSDEScheduler draws from a noise source of its"),
    ):
        generate(pipe, [1])


def test_a_plan_is_compiled_once_for_equal_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from sidestep.runtime import probe

    compiled, compile = [], probe.from_scheduler
    monkeypatch.setattr(
        probe, "from_scheduler", lambda s, n, **k: compiled.append(n) or compile(s, n, **k)
    )
    pipe = tiny_sd()
    with enable(pipe, driver="whole"):
        for steps in (4, 4, 3, 4):
            generate(pipe, [1], steps=steps)
        pipe.scheduler.register_to_config(prediction_type="v_prediction")
        generate(pipe, [1], steps=4)
    assert compiled == [4, 3, 4]


# -- guidance -----------------------------------------------------------------------------------


def end_guidance(pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """As the documentation of diffusers does it."""
    if k == 4:
        pipe._guidance_scale = 1.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
    return tensors


def change_guidance(pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 5.0 - 0.3 * k
    return tensors


@pytest.mark.parametrize("callback", [end_guidance, change_guidance])
@pytest.mark.parametrize("reuse", ["hold", "linear"])
def test_guidance_that_changes_is_seen_step_by_step(callback: Any, reuse: str) -> None:
    pipe = tiny_sd()
    settings = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        "steps": 10,
    }
    plain = generate(pipe, [1, 2], **settings)
    with enable(pipe, driver="whole"):
        assert_same(generate(pipe, [1, 2], **settings), plain)
    method = Adaptive(
        mode="third-difference", threshold=1.0, max_skip=1, reuse=reuse, protect_last=0
    )
    with enable(pipe, method) as handle:
        expected, skips = generate(pipe, [1, 2], **settings), marks(handle)
    assert "." in skips[0]
    with enable(pipe, method, driver="whole") as handle:
        assert_same(generate(pipe, [1, 2], **settings), expected)
        assert marks(handle) == skips


def test_equal_prompts_in_both_branches() -> None:
    pipe = tiny_sd()
    embeds = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    settings = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": embeds.clone(),
        "num_inference_steps": 6,
        "output_type": "latent",
    }
    plain = pipe(**settings, generator=torch.Generator().manual_seed(0)).images
    with enable(pipe, driver="whole"):
        assert_same(pipe(**settings, generator=torch.Generator().manual_seed(0)).images, plain)


def test_skip_layer_guidance_has_a_third_branch_for_a_while() -> None:
    case = CASES["StableDiffusion3"]
    pipe = case.build()
    settings = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6, "steps": 8}
    plain = run(case, pipe, [1, 2], **settings)
    with enable(pipe, driver="whole") as handle:
        assert_same(run(case, pipe, [1, 2], **settings), plain)
    assert handle.summary().ticks == 8 + 4  # steps 1 to 4
    with enable(pipe, PAPER) as handle:
        expected, skips = run(case, pipe, [1, 2], **settings), marks(handle)
    with enable(pipe, PAPER, driver="whole") as handle:
        assert_same(run(case, pipe, [1, 2], **settings), expected)
        assert marks(handle) == skips


# -- parts of a trajectory, several images ------------------------------------------------------


def test_several_images_of_a_prompt() -> None:
    pipe = tiny_sd()
    with enable(pipe, PAPER) as handle:
        expected, skips = generate(pipe, [1, 2], num_images_per_prompt=2, steps=10), marks(handle)
    with enable(pipe, PAPER, driver="whole") as handle:
        assert_same(generate(pipe, [1, 2], num_images_per_prompt=2, steps=10), expected)
        assert marks(handle) == skips
        assert len(skips) == 4


def test_a_loop_that_ends_early() -> None:
    from tiny_pipelines import tiny_sdxl

    pipe = tiny_sdxl()
    plain = generate(pipe, [1, 2], steps=8, denoising_end=0.5)
    with enable(pipe, driver="whole") as handle:
        assert_same(generate(pipe, [1, 2], steps=8, denoising_end=0.5), plain)
    assert handle.summary().steps == 4


def test_half_precision() -> None:
    pipe = tiny_sd().to(torch.bfloat16)
    plain = generate(pipe, [1, 2], steps=8)
    with enable(pipe, driver="whole"):
        whole = generate(pipe, [1, 2], steps=8)
    assert whole.dtype == torch.bfloat16
    # The pipeline rounds its latents to bfloat16 at each of the 8 steps, the engine does not.
    error = (whole.float() - plain.float()).abs().max() / plain.float().abs().max()
    assert float(error) < 8 * 2**-8


def test_the_model_is_called_as_often_as_before() -> None:
    pipe = tiny_sd()
    count = CountRows(pipe)
    with enable(pipe, driver="whole"):
        generate(pipe, [1, 2], steps=6)
    assert count.rows == [4] * 6
