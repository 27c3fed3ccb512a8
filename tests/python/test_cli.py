"""The command line as its user meets it: JSON, pictures, and one sentence for bad input."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_builders import tiny_unet

from sidestep.cli import main
from sidestep.errors import UserError
from sidestep.models import BUNDLED, load_pipeline
from sidestep.sampling import Job, run_jobs


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    return captured.out


def _fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    captured = capsys.readouterr()
    assert exit_.value.code == 2, captured.out
    assert captured.out == ""
    return captured.err


def test_compare_keeps_the_json_contract(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "pictures.png"
    text = _run(
        capsys, "compare", "frog on a bicycle", "blue tiger face", "--steps", "12",
        "--method", "adaptive", "--out", str(out), "--json",
    )  # fmt: skip
    document = json.loads(text)
    assert document["command"] == "compare"
    plain, adaptive = document["results"]
    keys = {"method", "solver", "steps", "batch", "nfe", "ticks", "seconds", "speedup", "psnr",
            "ssim", "layers"}  # fmt: skip
    assert keys <= set(plain) and keys <= set(adaptive)
    assert (plain["method"], plain["solver"], plain["steps"]) == ("plain", "ddim", 12)
    assert plain["nfe"] == 12 and plain["speedup"] == 1 and plain["psnr"] is None
    assert adaptive["batch"] == 2 and 4 <= adaptive["nfe"] <= 12 and adaptive["ticks"] <= 12
    assert adaptive["psnr"] > 20 and 0.5 < adaptive["ssim"] <= 1
    assert {Path(p).name for p in document["pictures"]} == {
        "pictures.png",
        "pictures-calls.png",
    }
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert pixels.std() > 10


def test_serial_against_itself_is_the_same_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = _run(
        capsys, "compare", "red apple", "--steps", "3", "--method", "serial",
        "--out", str(tmp_path / "p.png"), "--json",
    )  # fmt: skip
    _, serial = json.loads(text)["results"]
    assert serial["psnr"] == 100 and math.isclose(serial["ssim"], 1, abs_tol=1e-6)


def test_generate_writes_a_png_per_prompt(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hot dog\n\nblue tiger face\n")
    folder = tmp_path / "out"
    text = _run(
        capsys, "generate", "--prompts", str(prompts), "--steps", "4", "--method", "serial",
        "--solver", "dpmsolver++2m", "--out", str(folder), "--json",
    )  # fmt: skip
    results = json.loads(text)["results"]
    assert [r["prompt"] for r in results] == ["hot dog", "blue tiger face"]
    for r in results:
        assert Image.open(r["file"]).size == (64, 64)
        assert r["nfe"] == 4
    assert sorted(f.name for f in folder.iterdir()) == [
        "000-hot-dog.png",
        "001-blue-tiger-face.png",
    ]


def test_batch_size_does_not_change_the_noise(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pictures = []
    for batch in ("1", "2"):
        folder = tmp_path / batch
        _run(
            capsys, "generate", "hot dog", "taco", "--steps", "3", "--method", "serial",
            "--batch", batch, "--out", str(folder),
        )  # fmt: skip
        pictures.append([np.asarray(Image.open(f), dtype=int) for f in sorted(folder.iterdir())])
    for alone, together in zip(*pictures, strict=True):
        assert abs(alone - together).max() <= 1


def test_doctor_names_what_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(_run(capsys, "doctor", "--json"))
    parts = {finding["part"]: finding for finding in document["results"]}
    assert parts["native library"]["ok"] and parts["model emoji-sd"]["ok"]
    assert document["environment"]["torch"].startswith(parts["torch"]["found"])
    assert all(finding["ok"] or finding["fix"] for finding in parts.values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "x", "--model", "nowhere"], "--model: 'nowhere' is neither a bundled model"),
        (["generate", "x", "--steps", "0"], "--steps: got 0, expected more than 0"),
        (["compare", "x", "--batch", "-1"], "--batch: got -1, expected more than 0"),
        (
            ["generate", "--prompts", "no-such-file.txt"],
            "--prompts: cannot read 'no-such-file.txt'",
        ),
        (["generate", "x", "--prompts", "novel"], "got both"),
        (["generate", " "], "got an empty prompt"),
        (["generate", "x", "--solver", "magic"], "--solver: 'magic' is neither"),
        (["generate", "x", "--solver", "dpmsolver++2m", "--grid", "magic"], "--grid: 'magic' is"),
        (["generate", "x", "--threshold", "-1"], "threshold"),
        (["compare", "x", "--out", "/proc/none/x.png"], "--out: cannot write /proc/none/x.png"),
        (["compare", "x", "--out", "/proc/x.png"], "--out: cannot write /proc/x.png"),
        (["compare", "x", "--out", "x.xyz"], "x.xyz ends in '.xyz', expected .png"),
        (["generate", "x", "--out", "/proc/x"], "--out: cannot write /proc/x"),
        (["compare", "x", "--against-steps", "0"], "--against-steps: got 0, expected more than 0"),
        (["compare", "x", "--guidance", "nan"], "--guidance: got nan, expected a finite number"),
        (["generate", "x", "--seed", "99999999999999999999"], "--seed: got 99999999999999999999"),
        (["generate", "--prompts", ""], "--prompts: cannot read ''"),
        (["generate", "x", "--solver", "VQDiffusion"], "VQDiffusionScheduler does not fit"),
        (["generate", "x", "--solver", "HeunDiscrete"], "--method: "),
        (["generate", "x", "--steps", "abc"], "--steps"),
        (["generate", "x", "--no-such-option"], "--no-such-option"),
        (["bench", "solvers", "--calls", "0"], "--calls: got 0, expected more than 0"),
        (["compare", "x", "--out", "/"], "--out: / is a folder"),
        (["generate", "x", "--steps", "2000"], "2000"),
        (["train", "emoji-sd", "--data", "nowhere", "--out", "m", "--iterations", "1"], "npm pack"),
        (["bench", "solvers", "--prompts", "0"], "--prompts: got 0, expected more than 0"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    error = _fail(capsys, *arguments)
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "key", "value", "sentence"),
    [
        ("unet", "block_out_channels", [64, 128, 256], "--model: diffusers cannot load"),
        ("unet", "cross_attention_dim", 96, "--model: diffusers cannot load"),
    ],
)
def test_sizes_that_do_not_match_are_one_sentence(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    part: str,
    key: str,
    value: object,
    sentence: str,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED["emoji-sd"], model)
    config = json.loads((model / part / "config.json").read_text())
    (model / part / "config.json").write_text(json.dumps({**config, key: value}))
    out = tmp_path / "out"
    error = _fail(capsys, "generate", "x", "--model", str(model), "--steps", "1", "--out", str(out))
    assert sentence in error and len(error.strip().splitlines()) == 1 and not out.exists()


def test_a_gpu_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "out"
    error = _fail(capsys, "generate", "x", "--device", "cuda", "--out", str(out))
    assert "--device: got cuda, expected cpu" in error and not out.exists()


def test_a_broken_model_folder_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    error = _fail(capsys, "generate", "x", "--model", str(tmp_path), "--out", str(tmp_path / "o"))
    assert "--model: diffusers cannot load" in error and len(error.strip().splitlines()) == 1


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("sidestep")
    for start in ([sys.executable, "-m", "sidestep"], [str(command)]):
        result = subprocess.run(
            [*start, "generate", "x", "--steps", "0"], capture_output=True, text=True, cwd=tmp_path
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert "--steps: got 0" in result.stderr


def test_parts_that_do_not_fit_together_are_said_to() -> None:
    """They load, and differ only where the prompt's embedding meets the network."""
    pipe = load_pipeline("emoji-sd")
    pipe.unet = tiny_unet()
    with pytest.raises(UserError, match=r"^--model: its parts do not fit together: "):
        run_jobs(pipe, [Job(label="plain", steps=4)], ["frog"], guidance=7.5)
