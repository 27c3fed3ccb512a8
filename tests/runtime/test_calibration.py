"""Calibration files: written whole, read back, and taken in by settings or refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sidestep.runtime.calibration import Calibration, take_calibration
from sidestep.runtime.methods.adaptive import Adaptive


def made(**changes: Any) -> Calibration:
    values: dict[str, Any] = {
        "method": "Adaptive", "settings": {"mode": "error-control", "max_skip": 3},
        "threshold": 0.0123, "target": "psnr>=35", "confidence": 0.9, "model": "tiny",
        "model_hash": "abc", "dtype": "float32", "scheduler": {"class": "DDIMScheduler"},
        "steps": 50, "guidance": 7.5, "curve": [{"threshold": 0.0123, "kept": 9}],
        "fresh": {"kept": 8, "images": 9}, "seed": 4,
    }  # fmt: skip
    return Calibration(**{**values, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made().save(tmp_path / "made.json")
    return tmp_path / "made.json"


def test_a_file_is_read_back_as_it_was(path: Path) -> None:
    assert Calibration.load(path) == made()
    assert made().promise == "psnr>=35 for 90% of pictures"
    assert [file.name for file in path.parent.iterdir()] == ["made.json"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("not json", "calibration: cannot read {path} as JSON"),
        ("[]", "calibration: {path} is not one, expected what `sidestep calibrate` writes"),
        ('{"format": "x"}', "calibration: {path} is not one, expected what"),
        ('{"format": "sidestep-calibration-1"}', "calibration: {path} is not one: "),
    ],
)
def test_what_is_no_calibration_is_refused(path: Path, text: str, sentence: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        Adaptive(calibration=path)
    assert str(error.value).startswith(sentence.format(path=path))


def test_a_file_of_a_later_version_is_refused(path: Path) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "moon": "full"}))
    with pytest.raises(ValueError, match=r"is not one: .*moon"):
        Adaptive(calibration=path)
    path.write_text(json.dumps({**document, "settings": {"moon": "full"}}))
    with pytest.raises(ValueError, match="has a setting 'moon', unknown here"):
        Adaptive(calibration=path)
    path.write_text(json.dumps({**document, "settings": 3}))
    with pytest.raises(ValueError, match="its settings are no object"):
        Adaptive(calibration=path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"calibration: cannot read .*nowhere\.json as JSON"):
        Adaptive(calibration=str(tmp_path / "nowhere.json"))


def test_settings_take_the_file(path: Path) -> None:
    taken = Adaptive(calibration=str(path))
    assert (taken.threshold, taken.mode, taken.max_skip) == (0.0123, "error-control", 3)
    own = Adaptive(mode="error-control", threshold=0.0123, max_skip=3)
    assert replace(taken, calibration=None) == own
    assert Adaptive(calibration=str(path), max_skip=3, threshold=0.0123) == taken
    assert replace(taken, protect_last=5).protect_last == 5  # the file does not say


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"threshold": 0.02}, "Adaptive: threshold is 0.02, expected 0.0123 as in calibration"),
        ({"mode": "paper"}, "Adaptive: mode is 'paper', expected 'error-control' as in"),
        ({"mode": "learned"}, "Adaptive: mode is 'learned', expected 'error-control' as in"),
        ({"max_skip": 4}, "Adaptive: max_skip is 4, expected 3 as in calibration"),
    ],
)
def test_other_settings_than_the_files_are_refused(
    path: Path, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError) as error:
        Adaptive(calibration=str(path), **given)
    assert str(error.value).startswith(sentence) and str(error.value).endswith(str(path))


def test_a_target_is_what_the_file_promises(path: Path) -> None:
    promised = Calibration.load(path).target
    taken = Adaptive(target=f" {promised} ", calibration=path)
    assert taken.threshold == Adaptive(calibration=path).threshold
    with pytest.raises(ValueError, match=r"Adaptive: target is 'psnr>=99', expected 'psnr>=\d+'"):
        Adaptive(target="psnr>=99", calibration=path)
    with pytest.raises(ValueError, match="expected a calibration that promises it"):
        Adaptive(target="psnr>=35")


def test_any_settings_with_a_threshold(path: Path) -> None:
    """What comes after Adaptive does the same in one line."""

    @dataclass(frozen=True, kw_only=True)
    class EarlyLeave:
        threshold: float | None = None
        layers: int | None = None
        target: str | None = None
        calibration: str | Path | None = None

        def __post_init__(self) -> None:
            take_calibration(self)
            object.__setattr__(self, "threshold", 0.5 if self.threshold is None else self.threshold)

    with pytest.raises(ValueError, match=r"EarlyLeave: calibration .* is of Adaptive, expected of"):
        EarlyLeave(calibration=path)
    made(method="EarlyLeave", settings={"layers": 4}, threshold=0.25).save(path)
    assert EarlyLeave(calibration=path) == EarlyLeave(threshold=0.25, layers=4, calibration=path)
    assert EarlyLeave().threshold == 0.5
