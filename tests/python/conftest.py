"""Makes the `tiny_*` helpers importable by their stems, and gives two pipelines as fixtures.

`tests` itself must stay off sys.path: it holds a folder `runtime`, which would become importable.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

for _stem in ("tiny_builders", "tiny_methods", "tiny_cases", "tiny_pipelines"):  # as they import
    _spec = importlib.util.spec_from_file_location(_stem, Path(__file__).with_name(f"{_stem}.py"))
    assert _spec is not None and _spec.loader is not None
    sys.modules[_stem] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_stem])
tiny_pipelines = sys.modules["tiny_pipelines"]


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """A tiny Stable Diffusion pipeline (DDIM), and a tiny SDXL one (Euler)."""
    return getattr(tiny_pipelines, f"tiny_{request.param}")()


@pytest.fixture
def sd() -> StableDiffusionPipeline:
    """A tiny Stable Diffusion pipeline (DDIM)."""
    return tiny_pipelines.tiny_sd()
