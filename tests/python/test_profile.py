"""`sidestep profile`: the ranges are in the trace by name, and as many as there were calls."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from test_cli import _fail, _run

CALL = ["profile", "frog on a bicycle", "--device", "cpu", "--json"]


def _annotations(trace: Path) -> Counter[str]:
    events = json.loads(trace.read_text())["traceEvents"]
    return Counter(e["name"] for e in events if e.get("cat") == "user_annotation")


def test_adaptive(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    document = json.loads(_run(capsys, *CALL, "--steps", "3", "--out", str(out)))
    assert (document["command"], document["ticks"], document["nfe"]) == ("profile", 3, [3.0])
    counts = {result["range"]: result["count"] for result in document["results"]}
    assert counts == {"step": 3, "model": 3, "decide": 2}
    annotations = _annotations(out)
    assert annotations == {"step/0": 1, "step/1": 1, "step/2": 1, "model": 3, "decide": 2}
    spent = {result["range"]: result["milliseconds"] for result in document["results"]}
    assert 0 < spent["model"] < spent["step"] < 1000 * document["seconds"]
    operators = {one["name"]: one["calls"] for one in document["operators"]}
    assert operators["aten::convolution"] >= 3 and not set(operators) & set(annotations)
    (picture,) = document["pictures"]
    assert Path(picture) == tmp_path / "trace.png" and Image.open(picture).width > 500


def test_srds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    text = _run(
        capsys, *CALL, "--steps", "4", "--method", "srds", "--blocks", "2", "--out", str(out)
    )
    document, annotations = json.loads(text), _annotations(out)
    assert annotations["model"] == document["ticks"]
    assert {"fine[0:2]", "fine[2:4]", "correct", "decide", "step", "tick"} <= set(annotations)


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--method: got serial, expected adaptive or srds" in _fail(
        capsys, *CALL, "--method", "serial"
    )
    assert "--steps: got 0, expected more than 0" in _fail(capsys, *CALL, "--steps", "0")
    wrong = _fail(capsys, *CALL, "--out", str(tmp_path / "trace.txt"))
    assert "ends in '.txt', expected .json" in wrong
    assert "--nsight: the model is on cpu" in _fail(capsys, *CALL, "--nsight")
    assert list(tmp_path.iterdir()) == []
