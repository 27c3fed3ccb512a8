"""What a training of the bundled models starts from, in little: data package, pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from sidestep.models import BUNDLED

NAMES = {
    "fox face": ("Animals & Nature", ["fox_face"], "#e87722"),
    "tiger face": ("Animals & Nature", ["tiger"], "#f0a020"),
    "octopus": ("Animals & Nature", ["octopus"], "#d04040"),
    "bus": ("Travel & Places", ["bus"], "#3070d0"),
    "bicycle": ("Travel & Places", ["bike"], "#808080"),
    "blue heart": ("Smileys & Emotion", ["blue_heart"], "#2060f0"),
}
HELD_OUT = ["blue tiger face", "octopus on a bicycle", "smiling bus"]


def write_package(folder: Path) -> Path:
    """A folder laid out as the npm package, with six discs of different colours."""
    pictures = folder / "package" / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    entries = []
    for name, (category, short, colour) in NAMES.items():
        image = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(image).ellipse((12, 12, 51, 51), fill=colour)
        image.save(pictures / f"{name}.png")
        entry = {"name": name.upper(), "short_name": short[0], "short_names": short}
        entry |= {"category": category, "image": f"{name}.png", "has_img_google": True}
        entries.append(entry)
    (folder / "package" / "emoji.json").write_text(json.dumps(entries))
    return folder


def write_pipeline(folder: Path) -> Path:
    """A Stable Diffusion pipeline folder with a UNet of a few thousand weights."""
    from diffusers import (
        AutoencoderTiny,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    text = CLIPTextConfig(
        vocab_size=2048,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=0,
        eos_token_id=1,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
    )
    pipe = StableDiffusionPipeline(
        unet=unet,
        text_encoder=CLIPTextModel(text),
        vae=vae,
        tokenizer=CLIPTokenizer.from_pretrained(BUNDLED["emoji-sd"], subfolder="tokenizer"),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    (folder / "compositions.txt").write_text("\n".join(HELD_OUT) + "\n")
    (folder / "captions.txt").write_text("fox face\nbus\n")
    return folder


def write_linear_pipeline(folder: Path) -> Path:
    """`write_pipeline` with a DDIM that does not clip, and so is linear."""
    made = write_pipeline(folder)
    config = made / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "clip_sample": False}))
    return made
