"""A captured model call gives the output that it gave in the generation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

REPLAY = Path(__file__).resolve().parents[2] / "profiling" / "replay.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPLAY), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("replay") / "call.safetensors"
    done = _run("capture", str(file), "--steps", "3", "--step", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("unet of emoji-sd, step 1 of 3, 4 tensors\n")
    return file


def test_the_file_holds_the_call(captured: Path) -> None:
    tensors = load_file(captured)
    assert tensors["args.0"].shape == tensors["output"].shape == (2, 4, 16, 16)  # guidance pair
    assert torch.equal(*tensors["args.0"].chunk(2)) and not torch.equal(*tensors["output"].chunk(2))
    assert tensors["kwargs.encoder_hidden_states"].shape[0] == 2


def test_replay_equals_the_original(captured: Path, tmp_path: Path) -> None:
    picture = tmp_path / "replay.png"
    options = ("--repeats", "2", "--device", "cpu", "--picture", str(picture))
    done = _run("run", str(captured), *options)
    assert done.returncode == 0, done.stderr
    assert "unet of emoji-sd on cpu, step 1: the same bits; " in done.stdout
    assert Image.open(picture).width > 500


def test_another_input_is_another_output(captured: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(captured, "pt") as file:
        metadata = file.metadata()
    other = tmp_path / "other.safetensors"
    tensors = load_file(captured)
    save_file(tensors | {"args.0": tensors["args.0"] * 1.01}, other, metadata)
    done = _run("run", str(other), "--repeats", "1", "--device", "cpu")
    assert done.returncode == 0 and ": within " in done.stdout


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "tensors.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    for arguments, message in [
        (("run", str(file)), "holds no call, expected a file of `replay.py capture`"),
        (("run", str(tmp_path / "none")), "cannot be read"),
        (("run", str(file), "--repeats", "0"), "--repeats: got 0, expected 1 or more"),
        (("run", str(file), "--picture", "x.txt"), "x.txt ends in '.txt', expected .png"),
        (("capture", str(file), "--step", "10"), "--step: got 10, expected 0 to 9"),
    ]:
        done = _run(*arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("replay: ")
