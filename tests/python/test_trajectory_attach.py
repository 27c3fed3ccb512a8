"""The whole-trajectory driver as a guest: callbacks, exceptions, what it leaves behind."""

from typing import Any

import pytest
import torch
from tiny_pipelines import CountRows, generate, tiny_sd
from torch import Tensor

from sidestep import Adaptive, enable
from sidestep.adapters.guidance import fit_weights, probe
from sidestep.adapters.trajectory import WholeTrajectory

PAPER = Adaptive(mode="paper", threshold=0.05)
MIXED = Adaptive(mode="paper", threshold=0.01)  # prompts 1 and 2 skip different steps


def test_arguments_of_enable() -> None:
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="driver is 'both', expected 'stepwise' or 'whole'"):
        enable(pipe, driver="both")
    with pytest.raises(ValueError, match="on_step belongs to driver='whole', use the pipeline's"):
        enable(pipe, on_step=print)
    with pytest.raises(TypeError, match="method is 3, expected settings such as sidestep"):
        enable(pipe, 3, driver="whole")  # type: ignore[arg-type]


def test_disable_leaves_everything_as_it_was() -> None:
    pipe, fresh = tiny_sd(), tiny_sd()
    before = [(type(obj), dict(vars(obj))) for obj in (pipe, pipe.unet, pipe.scheduler)]
    with enable(pipe, driver="whole"):
        assert type(pipe.unet) is not type(fresh.unet)
    after = [(type(obj), dict(vars(obj))) for obj in (pipe, pipe.unet, pipe.scheduler)]
    assert after == before
    with enable(pipe, PAPER, driver="whole"):
        generate(pipe, [1], steps=5)
    assert torch.equal(generate(pipe, [2], steps=5), generate(fresh, [2], steps=5))


def test_the_summary_says_what_it_cost() -> None:
    pipe = tiny_sd()
    with enable(pipe, PAPER, driver="whole") as handle:
        assert handle.summary().note == "no generation has run yet"
        generate(pipe, [1, 2], steps=10)
        first = handle.summary()
        assert first.method == repr(PAPER)
        assert first.steps == 10
        assert first.nfe == tuple(float(sum(row)) for row in first.skip_map)
        assert first.nfe[0] < 10
        assert first.reasons[0][:5] == ("warm-up",) * 4 + ("skipped",)
        assert "model calls per image" in str(first)
        generate(pipe, [1], steps=4)
        assert handle.summary().nfe == (4.0,)
    assert handle.summary().nfe == (4.0,)  # it outlives the handle


def test_on_step_sees_the_real_latents() -> None:
    pipe, seen, stand_ins = tiny_sd(), [], []

    def on_step(k: int, x: Tensor, rows: Any) -> None:
        seen.append((k, list(rows), x.clone()))

    def on_step_end(_pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stand_ins.append(tensors["latents"].clone())
        return tensors

    real: list[Tensor] = []

    def keep(_pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        real.append(tensors["latents"].clone())
        return tensors

    generate(pipe, [1, 2], steps=5, callback_on_step_end=keep)
    with enable(pipe, driver="whole", on_step=on_step):
        result = generate(pipe, [1, 2], steps=5, callback_on_step_end=on_step_end)
    assert [(k, rows) for k, rows, _ in seen] == [(k, [0, 1]) for k in range(5)]
    for (_, _, x), latents in zip(seen, real, strict=True):
        torch.testing.assert_close(x, latents, rtol=1e-5, atol=1e-4)
    assert torch.equal(stand_ins[-1], result)
    assert not torch.allclose(stand_ins[2], real[2], atol=1.0)  # stand-ins on the way


def test_a_callback_that_changes_the_latents_is_refused() -> None:
    pipe = tiny_sd()

    def damp(_pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.5} if k == 2 else tensors

    with (
        enable(pipe, driver="whole"),
        pytest.raises(ValueError, match=r"changed the latents before step 3 .*or a callback"),
    ):
        generate(pipe, [1], steps=5, callback_on_step_end=damp)


def test_a_callback_that_changes_the_prompt_is_refused() -> None:
    pipe = tiny_sd()

    def change(_pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5}

    with (
        enable(pipe, driver="whole"),
        pytest.raises(ValueError, match=r"argument \['encoder_hidden_states'\] changes from step"),
    ):
        generate(
            pipe,
            [1],
            steps=5,
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )


def test_a_prompt_that_is_overwritten_is_refused() -> None:
    pipe = tiny_sd()

    def overwrite(_pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if k == 2:
            tensors["prompt_embeds"].mul_(0.5)
        return {}

    with (
        enable(pipe, driver="whole"),
        pytest.raises(ValueError, match=r"has written into the model's argument \['encoder_hidden"),
    ):
        generate(
            pipe,
            [1],
            steps=5,
            callback_on_step_end=overwrite,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )


def test_an_exception_in_the_model_leaves_nothing_behind() -> None:
    pipe = tiny_sd()
    plain = generate(pipe, [1, 2], steps=5)
    calls = []

    def fail(_module: Any, _args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory, say")

    with enable(pipe, driver="whole") as handle:
        hook = pipe.unet.conv_in.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory, say"):
            generate(pipe, [1, 2], steps=5)
        hook.remove()
        again = generate(pipe, [1, 2], steps=5)
        assert handle.summary().nfe == (5.0, 5.0)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-4)


def test_a_loop_that_is_interrupted_says_that_nothing_was_computed() -> None:
    pipe = tiny_sd()

    def interrupt(pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = k >= 1
        return tensors

    with enable(pipe, driver="whole"):
        with pytest.raises(RuntimeError, match="stopped after 2 of 5 steps, and the whole-traject"):
            generate(pipe, [1], steps=5, callback_on_step_end=interrupt)
        assert generate(pipe, [1], steps=5).isfinite().all()


def test_changed_sizes_and_a_replaced_scheduler() -> None:
    from diffusers import EulerDiscreteScheduler

    pipe = tiny_sd()
    with enable(pipe, PAPER, driver="whole") as handle:
        for prompts, steps in (([1], 5), ([1, 2, 3], 6)):
            generate(pipe, prompts, steps=steps)
            assert len(handle.summary().nfe) == len(prompts)
            assert handle.summary().steps == steps
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        result = generate(pipe, [1], steps=6)
        assert pipe.scheduler.step_index == 6
    with enable(pipe, PAPER):
        torch.testing.assert_close(result, generate(pipe, [1], steps=6), rtol=1e-5, atol=1e-4)


def test_a_loop_of_ones_own_without_a_pipeline() -> None:
    pipe = tiny_sd()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))

    def loop(steps: int, x: Tensor = x) -> Tensor:
        pipe.scheduler.set_timesteps(steps)
        for t in pipe.scheduler.timesteps:
            output = pipe.unet(x, t, encoder_hidden_states=text).sample
            x = pipe.scheduler.step(output, t, x).prev_sample
        return x

    with torch.no_grad():
        plain = loop(5)
        with enable(pipe, driver="whole"):
            torch.testing.assert_close(loop(5), plain, rtol=1e-5, atol=1e-4)
            t = pipe.scheduler.timesteps[-1]
            with pytest.raises(ValueError, match="calls its model after its last step"):
                pipe.unet(x, t, encoder_hidden_states=text)
            pipe.scheduler.set_timesteps(5)
            with pytest.raises(ValueError, match=r"DDIMScheduler.step came without a model call"):
                pipe.scheduler.step(x, t, x)


def test_under_inference_mode() -> None:
    pipe = tiny_sd()
    plain = generate(pipe, [1, 2], steps=6)
    with torch.inference_mode(), enable(pipe, driver="whole"):
        torch.testing.assert_close(generate(pipe, [1, 2], steps=6), plain, rtol=1e-5, atol=1e-4)


def test_a_compiled_model_gets_whole_batches_only() -> None:
    pipe = tiny_sd()
    count = CountRows(pipe)
    with enable(pipe, MIXED, driver="whole") as handle:
        result = generate(pipe, [1, 2], steps=12)
        skips = handle.summary().skip_map
    assert min(count.rows) == 2  # rows skip by themselves
    count.rows.clear()
    pipe.unet._compiled_call_impl = pipe.unet._call_impl  # what torch.compile sets
    with enable(pipe, MIXED, driver="whole") as handle:
        torch.testing.assert_close(generate(pipe, [1, 2], steps=12), result, rtol=1e-5, atol=1e-4)
        assert handle.summary().skip_map == skips
    assert set(count.rows) == {4}


def test_a_cache_of_diffusers_is_refused() -> None:
    class Cached(torch.nn.Module):
        is_cache_enabled = True

    with pytest.raises(ValueError, match=r"Cached has a cache of diffusers enabled.*disable_cache"):
        WholeTrajectory().predict(Cached(), (torch.zeros(1, 4, 8, 8), 1), {})


def test_a_model_with_two_outputs_is_refused() -> None:
    def model(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return x, x[:1]

    with pytest.raises(ValueError, match=r"tensors \[\[2, 4\], \[1, 4\]\] for a batch of 2"):
        WholeTrajectory().predict(model, (torch.zeros(2, 4), 1), {})


def test_weights_are_fitted() -> None:
    probes = [probe((2, 4, 8, 8), 3, number, torch.device("cpu")) for number in range(3)]
    weights = fit_weights(-6.5 * probes[0] + 7.25 * probes[1] + 0.25 * probes[2], probes)
    assert weights == pytest.approx([-6.5, 7.25, 0.25], abs=1e-6)
    half = (-6.5 * probes[0] + 7.5 * probes[1]).half()
    assert fit_weights(half, probes[:2]) == pytest.approx([-6.5, 7.5], abs=1e-3)
    for number in range(3):  # another one at every step
        assert not torch.equal(probes[number], probe((2, 4, 8, 8), 4, number, torch.device("cpu")))
    by_row = torch.tensor([1.0, 1.2]).view(2, 1, 1, 1) * probes[0]
    assert fit_weights(by_row, probes) is None
    assert fit_weights(probes[0].clamp(-2, 2), probes) is None
    assert fit_weights(probes[0] + 0.01, probes) is None
    assert fit_weights(torch.full_like(probes[0], float("nan")), probes) is None


def test_a_driver_alone() -> None:
    driver = WholeTrajectory()
    with pytest.raises(ValueError, match="called without latents as its first argument"):
        driver.predict(lambda **kwargs: None, (), {"text": 1})
    driver.finish()
    assert driver.summary().nfe == ()
    assert driver.summary().method == "every call"
