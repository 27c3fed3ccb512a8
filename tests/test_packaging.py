"""What a built package holds beside its modules."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
PREDICTOR = "methods/criteria/learned.safetensors"
MODEL = "models/emoji-sd/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The data files that `setup.py` puts into each package, by folder."""
    given: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **settings: given.update(settings))
    runpy.run_path("setup.py")
    kept = ("package_dir", "packages", "package_data")
    package = setuptools.Distribution({name: given[name] for name in kept})
    build: Any = package.get_command_obj("build_py")
    build.ensure_finalized()
    return {source: set(names) for _, source, _, names in build.data_files if names}


def test_every_file_that_is_no_module_is_packaged(packaged: dict[str, set[str]]) -> None:
    assert PREDICTOR in packaged["runtime"] and MODEL in packaged["python/sidestep"]
    for folder in ("python/sidestep", "runtime", "triton_kernels"):
        files = {file for file in (ROOT / folder).rglob("*") if file.is_file()}
        beside = {
            str(file.relative_to(ROOT / folder))
            for file in files
            if file.suffix not in (".py", ".pyc", ".so", ".pyd")
        }
        assert beside <= packaged.get(folder, set()), folder
