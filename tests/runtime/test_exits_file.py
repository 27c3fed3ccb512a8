"""The exits file: there and back, whose it is, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_course import tiny_exits
from torch import nn

from sidestep.runtime.exits.file import FORMAT, Exits, load_exits, save_exits
from sidestep.runtime.exits.modules import Parts
from sidestep.runtime.identity import difference, model_hash, sample_weights


@pytest.mark.parametrize("kind", ["excess", "faithful"])
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    written = tiny_exits(kind, trained={"steps": 20, "scheduler": "DDIMScheduler"})
    save_exits(written, tmp_path / "exits")
    read = load_exits(tmp_path / "exits")
    for name in Exits.__dataclass_fields__:
        ours, theirs = getattr(read, name), getattr(written, name)
        if isinstance(theirs, Parts):
            for key, tensor in theirs.tensors().items():
                assert torch.equal(ours.tensors()[key], tensor)
        elif isinstance(theirs, torch.Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs
    assert list(tmp_path.iterdir()) == [tmp_path / "exits"]


def rewritten(path: Path, tensors: dict[str, Any] | None = None, **head: Any) -> Path:
    """The file again, with other tensors or another head; None leaves one out."""
    kept = {k: v for k, v in {**load_file(path), **(tensors or {})}.items() if v is not None}
    old = {
        "format": FORMAT, "kind": "excess", "model": "Toy", "model_hash": "0",
        "blocks": 4, "after": [1, 3], "trained": {},
    }  # fmt: skip
    save_file(kept, path, {"exits": json.dumps(old | head)})
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "other"}, "its format is 'other', expected 'sidestep-exits-2'"),
        ({"kind": "other"}, "its kind is 'other', expected one of"),
        ({"after": [3, 1]}, r"its exits are after blocks \[3, 1\] of 4"),
        ({"after": [1, 4]}, r"its exits are after blocks \[1, 4\] of 4"),
        ({"after": []}, r"its exits are after blocks \[\] of 4"),
        ({"after": [1]}, r"probes.weight has shape \[2, 3, 2\], expected \[1, 3, 2\]"),
        ({"after": "x"}, "invalid literal"),
        ({"blocks": None}, "NoneType"),
        ({"tensors": {"probes.bias": None}}, "it has no 'probes.bias'"),
        ({"tensors": {"model.weights": None}}, "it has no 'model.weights'"),
        ({"tensors": {"probes.bias": torch.zeros(2, 3).double()}}, "finite numbers in float32"),
        ({"tensors": {"probes.bias": torch.full((2, 3), torch.nan)}}, "finite numbers in float32"),
        ({"tensors": {"translators.matrix": torch.zeros(2, 2, 3)}}, r"expected \[2, 2, 2\]"),
        ({"tensors": {"measured.log_snr": torch.zeros(2)}}, "log_snr does not increase"),
        ({"tensors": {"measured.errors": torch.zeros(2, 2)}}, "measured.errors holds numbers that"),
        ({"tensors": {"probes.weight": torch.zeros(2)}}, "probes.weight has shape"),
    ],
)
def test_files_that_do_not_hold_together(tmp_path: Path, changes: dict, sentence: str) -> None:
    save_exits(tiny_exits(), tmp_path / "exits")
    with pytest.raises(ValueError, match=sentence) as raised:
        load_exits(rewritten(tmp_path / "exits", **changes))
    assert str(raised.value).startswith("EarlyExit: ") and "\n" not in str(raised.value)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for made, sentence in (
        (lambda: path.write_bytes(b"\xff" * 40), "cannot read the exits file"),
        (lambda: path.write_bytes(b""), "cannot read the exits file"),
        (lambda: save_file({"a": torch.zeros(1)}, path), "it has no 'exits'"),
        (lambda: save_file({}, path, {"exits": "[]"}), "no exits file of this"),
        (lambda: save_file({}, path, {"exits": "{"}), "no exits file of this"),
    ):
        made()
        with pytest.raises(ValueError, match=sentence):
            load_exits(path)
    with pytest.raises(ValueError, match="cannot read the exits file"):
        load_exits(tmp_path)


class Toy(nn.Module):
    """Something with a configuration, as diffusers' models have one."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"heads": 2, "_name_or_path": "here", **config}
        self.linear = nn.Linear(30, 20)
        self.scale = nn.Parameter(torch.ones(()))


def told(model: nn.Module) -> tuple[str, str, torch.Tensor]:
    return type(model).__name__, model_hash(model), sample_weights(model)


def test_a_model_is_known_again_in_another_dtype_and_from_another_folder() -> None:
    mine = told(Toy())
    assert difference(Toy(), *mine) == ""
    for dtype in (torch.bfloat16, torch.float16):
        assert difference(Toy().to(dtype), *mine) == ""
    assert difference(Toy(_name_or_path="there", _diffusers_version="9"), *mine) == ""
    assert "configuration or shapes" in difference(Toy(heads=3), *mine)
    other = Toy()
    other.linear.weight.data[3, 4] += 1  # not looked at
    assert difference(other, *mine) == ""
    other.linear.weight.data[19, 29] += 1
    assert "with other weights" in difference(other, *mine)
    assert "it is for a Toy, this is a Linear" in difference(nn.Linear(2, 2), *mine)


def test_check_model_says_what_to_do() -> None:
    name, digest, weights = told(Toy())
    exits = replace(tiny_exits(), model=name, model_hash=digest, model_weights=weights)
    exits.check_model(Toy())
    with pytest.raises(ValueError, match=r"does not fit: it is for another Toy .*train exits"):
        exits.check_model(Toy(heads=7))
