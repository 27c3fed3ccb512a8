"""The code on docs/embedding-c.md is compiled against an installed library and run."""

from __future__ import annotations

import re
from pathlib import Path

import capi
import pytest

PAGE = (capi.ROOT / "docs" / "embedding-c.md").read_text()


def _code(language: str) -> str:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (code,) = (text for name, text in blocks if name == language)
    return code


def test_the_page(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(_code("python"), {})
    for name, language in (("CMakeLists.txt", "cmake"), ("server.cpp", "cpp"), ("inspect.c", "c")):
        (tmp_path / name).write_text(_code(language))
    ninja = f"-DCMAKE_MAKE_PROGRAM={capi.tool('ninja')}"
    at = f"-DCMAKE_PREFIX_PATH={installed}"
    capi.run(capi.tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", ninja, at)
    capi.run(capi.tool("cmake"), "--build", tmp_path / "build")
    assert capi.run(tmp_path / "build/server") == _code("")
    said = capi.run(tmp_path / "build/inspect", "sampler.plan")
    assert said == "DPMSolverMultistep: 20 model calls, 2 registers\n"
