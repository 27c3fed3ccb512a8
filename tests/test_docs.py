"""The code on the pages under docs/ runs, and prints what its comments say."""

import re
from pathlib import Path

import pytest

from sidestep.models import load_pipeline

DOCS = Path(__file__).resolve().parent.parent / "docs"


def _code(page: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks, f"{page} holds no code"
    return "\n".join(blocks)


def test_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = _code("plans.md")
    names: dict = {}
    exec(code, names)
    promised = re.search(r"print\(plan\)  # (.*)", code)
    assert promised and capsys.readouterr().out.splitlines()[0] == promised[1]
    assert names["x"].shape == (1, 4, 64, 64)
    assert names["Plan"].load("sampler.plan") == names["plan"]


def test_adaptive(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {"pipe": load_pipeline("emoji-sd")}
    exec(_code("adaptive.md"), names)
    assert len(names["images"]) == 1
    assert "50 steps, 1 images" in capsys.readouterr().out
