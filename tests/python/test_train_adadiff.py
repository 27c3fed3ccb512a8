"""`sidestep train exits --mode faithful`: loss by layers, the folder, going on, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import sidestep
from sidestep.errors import UserError
from sidestep.runtime.exits.file import load_exits
from sidestep.training.exits_faithful import (
    EXITS,
    SWITCHES,
    FaithfulTraining,
    _fresh,
    adadiff_loss,
    train_faithful,
    uncertainties,
)
from sidestep.training.exits_record import Looking

Make = Callable[..., FaithfulTraining]


@pytest.fixture
def settings(package: Path, dit: Path, tmp_path: Path) -> Make:
    """Two iterations, but for the changes."""

    def make(**changes: Any) -> FaithfulTraining:
        values: dict[str, Any] = {
            "out": tmp_path / "out", "data": package, "init": dit, "batch": 4, "coloured": 8,
            "collages": 8, "iterations": 2,
        }  # fmt: skip
        return FaithfulTraining(**values | changes)

    return make


CALL = {"use_resolution_binning": False, "max_sequence_length": 24, "clean_caption": False}


def test_adadiff_trains_a_model_that_rows_leave(settings: Make, dit: Path) -> None:
    result = train_faithful(settings(iterations=40, batch=8, lr=3e-3))
    assert sum(result.losses[-10:]) < 0.9 * sum(result.losses[:10])
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (result.out / weights).read_bytes() != (dit / weights).read_bytes()
    assert "none; AdamW" in (result.out / "README.md").read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(result.out)
    pipe.set_progress_bar_config(disable=True)
    exits = load_exits(result.out / EXITS)
    assert (exits.kind, exits.after, exits.probes.weight.shape) == ("faithful", (1, 2), (2, 1, 16))
    call = {**CALL, "guidance_scale": 7.5, "num_inference_steps": 3, "output_type": "latent"}
    for threshold, depths in ((0.0, (3.0, 3.0, 3.0)), (1.0, (3.0, 1.0, 1.0))):
        method = sidestep.EarlyExit(exits=result.out / EXITS, threshold=threshold)
        with sidestep.enable(pipe, method) as handle:
            pipe(["red fox face", "bus"], **call)
            assert handle.summary().layers == (depths, depths)


@pytest.mark.parametrize("map", [False, True])
def test_the_loss_is_its_formula(settings: Make, dit: Path, map: bool) -> None:
    """Layer by layer, picture by picture, without what makes it quick."""
    from tiny_adadiff import naive_loss, prepared

    run = settings(map=map, weigh_u=0.5, weigh_layers=2.0)
    model, data, captions, alphas = prepared(dit, run)
    looking = Looking(model)
    probes = _fresh(run, model, 2)
    probes = replace(
        probes, time=torch.randn(probes.time.shape), bias=torch.randn(probes.bias.shape)
    )
    with looking, torch.no_grad():
        ours = adadiff_loss(
            looking, probes, data, captions, alphas, run, torch.Generator().manual_seed(5)
        )
        theirs = naive_loss(looking, probes, data, captions, alphas, run)
    assert float(ours) == pytest.approx(theirs, rel=1e-4)


def test_the_score_is_the_mean_of_the_tokens(settings: Make, dit: Path) -> None:
    from sidestep.runtime.exits.modules import Probes

    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    probes = Probes(weight=rand(2, 3, 16), time=rand(2, 3, 16), bias=rand(2, 3))
    hidden, snr = rand(2, 4, 5, 16), rand(4)
    u = uncertainties(probes, hidden, snr)
    for layer in range(2):
        score = probes(layer, hidden[layer], snr, normalise=False)
        torch.testing.assert_close(u[layer].mean(1), score)


def test_a_run_that_goes_on_equals_one_that_never_stopped(settings: Make, tmp_path: Path) -> None:
    whole = train_faithful(settings(out=tmp_path / "whole", iterations=4))
    train_faithful(settings())
    with pytest.raises(UserError, match="there from an earlier run; resume it, or remove the fil"):
        train_faithful(settings())
    second = train_faithful(settings(iterations=4, resume=True))
    assert second.losses == whole.losses
    for file in (EXITS, "transformer/diffusion_pytorch_model.safetensors"):
        assert (second.out / file).read_bytes() == (whole.out / file).read_bytes()
    with pytest.raises(UserError, match="of a run with map False, expected True"):
        train_faithful(settings(map=True, resume=True))


def test_the_released_switches_change_what_is_learned(settings: Make, tmp_path: Path) -> None:
    plain = train_faithful(settings(iterations=3)).losses
    for name in SWITCHES:
        run = settings(out=tmp_path / name, iterations=3, **{name: True})
        result = train_faithful(run)
        assert result.losses != plain and np.isfinite(result.losses).all()
        probes = load_exits(result.out / EXITS).probes
        assert bool(probes.time.any()) == (name != "timeless")
        assert probes.weight.shape[1] == (16 if name == "map" else 1)
        assert name in (result.out / "README.md").read_text()


def test_what_adadiff_refuses(settings: Make, tiny: Path, dit: Path) -> None:
    with pytest.raises(UserError, match="not the pipeline folder to start from, it has no trans"):
        train_faithful(settings(init=tiny))
    with pytest.raises(UserError, match="out is the folder the training starts from"):
        train_faithful(settings(out=dit))
    with pytest.raises(UserError, match="weigh_u is -1, expected 0 or more"):
        settings(weigh_u=-1)
