"""Calibrating early exit: which exits file, reuse of steps with it, what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_exits import random_exits, write_exits

import sidestep
from sidestep.adapters.calling import own_size
from sidestep.calibration import Question, Target, calibrate
from sidestep.cli import main
from sidestep.models import load_pipeline
from sidestep.runtime.calibration import Calibration
from sidestep.runtime.exits.file import save_exits
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.early_exit import EarlyExit

PROMPTS = ["red fox face", "bus", "octopus"]


@pytest.fixture(scope="module")
def exits(dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformer = diffusers.DiffusionPipeline.from_pretrained(dit).transformer
    return write_exits(transformer, tmp_path_factory.mktemp("exits"), after=(1, 2))


def asked(dit: Path, method: EarlyExit, **changes: Any) -> Question:
    values: dict[str, Any] = {
        "target": Target.parse("psnr>=1"), "confidence": 0.6, "method": method, "images": 3,
        "thresholds": (0.05, 9.0), "model": str(dit), "steps": 4, "batch": 3,
    }  # fmt: skip
    return Question(**{**values, **changes})


def generate(pipe: Any, steps: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "bus", num_inference_steps=steps, guidance_scale=7.5, generator=generator,
        output_type="latent", **own_size(pipe),
    ).images  # fmt: skip


def test_the_command_writes_which_exits_it_is_for(
    dit: Path, exits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "made.json"
    line = ["calibrate", "--model", str(dit), "--prompts", str(tmp_path / "prompts.txt")]
    line += ["--method", "early-exit", "--exits", str(exits), "--target", "psnr>=1"]
    line += ["--images", "3", "--confidence", "0.6", "--batch", "3", "--steps", "4"]
    line += ["--threshold", "0.05", "--threshold", "9", "--out", str(out)]
    with pytest.raises(SystemExit) as end:
        main([*line, "--json"])
    assert not end.value.code
    document = json.loads(capsys.readouterr().out)["calibration"]
    found = Calibration.load(out)
    assert document == found.document() and (found.method, found.threshold) == ("EarlyExit", 9)
    digest = hashlib.sha256(exits.read_bytes()).hexdigest()
    assert found.settings == {
        "exits": f"sha256:{digest}", "mode": "static", "batch_mean": False,
        "branches_apart": False, "reuse": None,
    }  # fmt: skip
    assert found.curve[0]["layers"] > found.curve[1]["layers"] == found.fresh["layers"] == 1
    with pytest.raises(SystemExit):
        main(line)
    told = capsys.readouterr().out
    assert "blocks a step" in told and "4.0 of 4.0 calls, 1.0 blocks a step" in told
    for more, sentence in (
        (["--reuse", "-1"], "threshold is -1.0, expected"),
        (["--max-skip", "2"], "--max-skip: got it with --method early-exit, expected adaptive"),
        (["--exits", str(tmp_path / "none")], "cannot read the exits file"),
        (["--method", "adaptive"], "--exits: got it with --method adaptive, expected early-exit"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*line, *more])
        assert end.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["static", "sample"])
def test_settings_take_the_file_with_reuse_and_all(
    dit: Path, exits: Path, tmp_path: Path, mode: str
) -> None:
    reuse = Adaptive(threshold=1.0, mode="error-control")
    method = EarlyExit(exits=exits, mode=mode, reuse=reuse)
    made = calibrate(load_pipeline(str(dit)), PROMPTS, asked(dit, method))
    file = tmp_path / "made.json"
    made.save(file)
    assert made.threshold == 9 and made.settings["reuse"]["threshold"] == 1
    assert "calibration" not in made.settings["reuse"]
    taken = EarlyExit(exits=str(exits), calibration=file)
    assert (taken.mode, taken.threshold, taken.reuse) == (mode, 9, reuse)
    pipe = load_pipeline(str(dit))
    with sidestep.enable(pipe, taken) as handle:
        images = generate(pipe)
        assert handle.summary().mean_depth < 2
    with sidestep.enable(pipe, EarlyExit(exits=exits, mode=mode, reuse=reuse, threshold=9)):
        assert torch.equal(images, generate(pipe))
    with (
        sidestep.enable(pipe, taken),
        pytest.warns(UserWarning, match="5 steps and not 4: the calibration's promise, psnr>=1"),
    ):
        generate(pipe, steps=5)
    with torch.no_grad():
        pipe.vae.decoder.layers[0].weight += 1
    with pytest.raises(ValueError, match=r"made for the model .* weights are others"):
        sidestep.enable(pipe, taken)


def test_what_differs_from_the_file_is_refused(dit: Path, exits: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(str(dit))
    made = calibrate(pipe, PROMPTS, asked(dit, EarlyExit(exits=exits), thresholds=(0.05,)))
    file, other = tmp_path / "made.json", tmp_path / "other.safetensors"
    made.save(file)
    save_exits(random_exits(pipe.transformer, after=(1, 2), seed=4), other)
    with pytest.raises(ValueError, match=r"exits is 'sha256:\w{64}', expected 'sha256:\w{64}' as"):
        EarlyExit(exits=other, calibration=file)
    with pytest.raises(ValueError, match="mode is 'sample', expected 'static' as in calibration"):
        EarlyExit(exits=exits, mode="sample", calibration=file)
    with pytest.raises(ValueError, match=r"threshold is 0\.1, expected 0\.05 as in calibration"):
        EarlyExit(exits=exits, threshold=0.1, calibration=file)
    with pytest.raises(ValueError, match="is of EarlyExit, expected of Adaptive"):
        Adaptive(calibration=file)
    with pytest.raises(ValueError, match="cannot read none"):
        EarlyExit(exits="none", calibration=file)
    alone = tmp_path / "adaptive.json"
    question = asked(dit, Adaptive(), thresholds=(0.01,))  # type: ignore[arg-type]
    calibrate(pipe, PROMPTS, question).save(alone)
    with pytest.raises(ValueError, match="reuse has a calibration, which promises nothing of"):
        EarlyExit(exits=exits, reuse=Adaptive(calibration=alone))
