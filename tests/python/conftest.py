"""Two tiny pipelines as fixtures, and what a tiny training starts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny_emoji
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


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as the npm package, with six discs of different colours."""
    return tiny_emoji.write_package(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline folder with a UNet of a few thousand weights."""
    return tiny_emoji.write_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def dit(package: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny emoji-dit that has learned a little."""
    from sidestep.training.emoji_dit import TransformerTraining, train_transformer

    out = tmp_path_factory.mktemp("models") / "dit"
    settings = TransformerTraining(
        out=out, data=package, init=tiny, batch=8, layers=3, heads=2, head_size=8, coloured=8,
        collages=8, iterations=40, lr=1e-2,
    )  # fmt: skip
    return train_transformer(settings).out
