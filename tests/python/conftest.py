"""Two tiny pipelines as fixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny_pipelines

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """A tiny Stable Diffusion pipeline (DDIM), and a tiny SDXL one (Euler)."""
    return getattr(tiny_pipelines, f"tiny_{request.param}")()


@pytest.fixture
def sd() -> StableDiffusionPipeline:
    """A tiny Stable Diffusion pipeline (DDIM)."""
    return tiny_pipelines.tiny_sd()
