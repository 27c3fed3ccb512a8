"""Weights come from safetensors; nothing that serves unpickles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tiny_emoji import write_pipeline
from transformers import CLIPConfig, CLIPImageProcessor

from sidestep.errors import UserError
from sidestep.models import BUNDLED, load_pipeline

ROOT = Path(__file__).resolve().parents[2]
SERVES = [
    "examples", "python/sidestep/adapters", "python/sidestep/models", "python/sidestep/serving",
    "runtime", "triton_kernels",
]  # fmt: skip
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("folder", SERVES)
def test_nothing_that_serves_unpickles(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            imports = isinstance(node, ast.Import | ast.ImportFrom)
            names = [alias.name for alias in node.names] if imports else []
            assert not MODULES & {name.split(".")[0] for name in names}, file
            assert not isinstance(node, ast.ImportFrom) or node.module not in MODULES, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "np.load"), f"{file}: {called}"


def test_the_bundled_weights_are_safetensors() -> None:
    files = [file for file in BUNDLED["emoji-sd"].rglob("*") if file.stat().st_size > 2_000_000]
    assert files and all(file.suffix == ".safetensors" for file in files)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "tiny")
    unet = load_pipeline(str(folder)).unet
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_pipeline(str(folder))


def test_programs_that_serve_keep_the_safety_checker(tmp_path: Path) -> None:
    seen = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=seen, projection_dim=8))
    parts = {
        **load_pipeline("emoji-sd").components,
        "safety_checker": checker,
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    }
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path)).safety_checker is None
    pipe = load_pipeline(str(tmp_path), safety_checker=True)
    assert isinstance(pipe.safety_checker, StableDiffusionSafetyChecker)
    assert pipe("frog", num_inference_steps=1).nsfw_content_detected == [False]
