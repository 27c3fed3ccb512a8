"""What `EarlyExit` refuses, and the models and schedulers that need care."""

from __future__ import annotations

import copy
from pathlib import Path

import diffusers
import pytest
import tiny_builders as build
import torch
from tiny_exits import (
    BLOCKS,
    MODELS,
    generate,
    random_exits,
    write_exits,
)
from tiny_pipelines import tiny_sd

import sidestep
from sidestep.runtime.exits.file import save_exits
from sidestep.runtime.methods.early_exit import EarlyExit


def test_models_that_rows_cannot_leave_are_refused(tmp_path: Path) -> None:
    pixart = MODELS["PixArtTransformer2DModel"][0]()
    method = EarlyExit(exits=write_exits(pixart.transformer, tmp_path))
    with pytest.raises(ValueError, match="UNet2DConditionModel: a UNet's blocks differ in width"):
        sidestep.enable(tiny_sd(), method)
    with pytest.raises(ValueError, match="WanTransformer3DModel: how its blocks hand rows on is"):
        sidestep.enable(build.tiny_wan(), method)
    with pytest.raises(ValueError, match="it is for a PixArtTransformer2DModel, this is a DiTTr"):
        sidestep.enable(build.tiny_dit(), method)
    with pytest.raises(ValueError, match=r"another PixArt.* \(configuration or shapes differ\)"):
        sidestep.enable(build.tiny_pixart(BLOCKS + 1), method)
    pixart.transformer.transformer_blocks[2].ff.net[2].weight.data += 1e-2
    with pytest.raises(ValueError, match="for a PixArtTransformer2DModel with other weights"):
        sidestep.enable(pixart, method)
    assert type(pixart.transformer).__name__ == "PixArtTransformer2DModel"
    assert not hasattr(pixart.transformer, "_sidestep_owner")


def test_a_second_denoiser_and_the_whole_driver_are_refused(tmp_path: Path) -> None:
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    method = EarlyExit(exits=write_exits(pipe.transformer, tmp_path))
    with pytest.raises(ValueError, match="leaves within model calls, expected driver='stepwise'"):
        sidestep.enable(pipe, method, driver="whole")
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(ValueError, match="has 2 denoisers, and the exits of one are not those"):
        sidestep.enable(pipe, method)


def test_a_compiled_model_is_refused(tmp_path: Path) -> None:
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    method = EarlyExit(exits=write_exits(pipe.transformer, tmp_path))
    pipe.transformer.compile()  # compiles when it is called
    with pytest.raises(ValueError, match="PixArtTransformer2DModel is compiled, and every size"):
        sidestep.enable(pipe, method)


def test_steps_of_noise_are_no_hindrance(tmp_path: Path) -> None:
    """Translators need nothing from earlier steps; no call is continued over the noise."""
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler(**build.BETAS)
    file = write_exits(pipe.transformer, tmp_path)
    with sidestep.enable(pipe, EarlyExit(exits=file, threshold=0.3)) as handle:
        generate(pipe, "PixArtTransformer2DModel", [1])
        assert handle.summary().mean_depth < BLOCKS
        rule = handle._driver.leaving.rule  # type: ignore[union-attr]
        assert rule.rests is None and min(rule.plan.exits) >= 0
    with sidestep.enable(pipe, EarlyExit(exits=file, threshold=0.3, reuse=False)):
        generate(pipe, "PixArtTransformer2DModel", [1])
    reuse = sidestep.Adaptive()
    with pytest.raises(ValueError, match="adds noise at every step, which hides how fast"):
        sidestep.enable(pipe, EarlyExit(exits=file, reuse=reuse))


def test_a_model_that_is_replaced_is_looked_at_again(tmp_path: Path) -> None:
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    file = write_exits(pipe.transformer, tmp_path)
    with sidestep.enable(pipe, EarlyExit(exits=file, threshold=1e9)) as handle:
        pipe.transformer = copy.deepcopy(pipe.transformer)
        generate(pipe, "PixArtTransformer2DModel", [1])
        assert handle.summary().mean_depth < BLOCKS
        pipe.transformer.proj_out.weight.data += 1
        pipe.transformer = copy.deepcopy(pipe.transformer)
        with pytest.raises(ValueError, match="with other weights"):
            generate(pipe, "PixArtTransformer2DModel", [1])


def test_half_precision_and_a_scheduler_without_log_snr(tmp_path: Path) -> None:
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    file = write_exits(pipe.transformer, tmp_path)
    pipe.to(torch.bfloat16)
    with sidestep.enable(pipe, EarlyExit(exits=file, threshold=0.3)) as handle:
        latents = generate(pipe, "PixArtTransformer2DModel", [1, 2])
        assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
        assert handle.summary().mean_depth < BLOCKS
    pipe.scheduler = diffusers.HeunDiscreteScheduler(**build.BETAS)
    with sidestep.enable(pipe, EarlyExit(exits=file, threshold=0.3)) as handle:
        generate(pipe, "PixArtTransformer2DModel", [1], steps=3)
        assert handle.summary().mean_depth == BLOCKS
        assert handle.summary().note == (
            "no row left early: the scheduler does not say how log-SNR rises"
        )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "each"}, "mode is 'each', expected one of: 'static', 'sample', 'adadiff'"),
        ({"mode": "adadiff"}, "was trained with --mode excess, expected one trained with --mode f"),
        ({"threshold": -1.0}, "threshold is -1.0, expected 0 or more"),
        ({"threshold": float("nan")}, "threshold is nan, expected 0 or more"),
        ({"batch_mean": True}, "belong to mode 'adadiff', got 'static'"),
        ({"exits": "none.safetensors"}, "cannot read the exits file none.safetensors"),
    ],
)
def test_bad_settings(tmp_path: Path, changes: dict, sentence: str) -> None:
    file = write_exits(MODELS["DiTTransformer2DModel"][0]().transformer, tmp_path)
    with pytest.raises(ValueError, match=sentence):
        EarlyExit(**{"exits": file, **changes})


def test_settings_are_completed_from_the_file(tmp_path: Path) -> None:
    model = MODELS["DiTTransformer2DModel"][0]().transformer
    file = write_exits(model, tmp_path)
    assert (EarlyExit(exits=file).mode, EarlyExit(exits=file).threshold) == ("static", 0.12)
    save_exits(random_exits(model, kind="faithful"), file)
    assert (EarlyExit(exits=file).mode, EarlyExit(exits=file).threshold) == ("adadiff", 0.08)


def test_weights_that_are_not_in_memory_are_refused(tmp_path: Path) -> None:
    pipe = MODELS["PixArtTransformer2DModel"][0]()
    file = write_exits(pipe.transformer, tmp_path)
    pipe.transformer.to("meta")
    with pytest.raises(ValueError, match=r"not in memory \(sequential offload\)"):
        sidestep.enable(pipe, EarlyExit(exits=file))
