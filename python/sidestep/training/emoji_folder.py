"""The pipeline folder the emoji training starts from and the one it writes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.errors import UserError
from sidestep.training.emoji_data import Example

SIZE_LIMIT = 30_000_000
CAPTION_DROPOUT = 0.1
PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Training examples as the models see them."""

    latents: Tensor  # [N, 4, h, w] fp32
    tokens: Tensor  # [N, L] int64
    empty: Tensor  # [L] int64: the tokens of the empty caption
    weights: Tensor  # [N] fp64: how often each example is drawn


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A batch of examples with noise on them."""

    rows: Tensor  # [n] int64: which examples
    dropped: Tensor  # [n, 1] bool: whose caption is dropped
    t: Tensor  # [n] int64
    noise: Tensor  # [n, 4, h, w]
    x: Tensor  # [n, 4, h, w]: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise


def draw(
    data: Encoded,
    alphas: Tensor,  # [T] fp32: cumulative products abar_t
    batch: int,
    generator: torch.Generator,
) -> Drawn:
    """A random batch; the times are stratified, one in each of `batch` equal parts."""
    rows = torch.multinomial(data.weights, batch, replacement=True, generator=generator)
    x0 = data.latents[rows]  # [batch, 4, h, w]
    dropped = torch.rand(batch, 1, generator=generator) < CAPTION_DROPOUT
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch  # [batch] in [0, 1)
    t = (u * len(alphas)).long().clamp(max=len(alphas) - 1)
    noise = torch.randn(x0.shape, generator=generator)
    abar = alphas[t][:, None, None, None]
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    return Drawn(rows=rows, dropped=dropped, t=t, noise=noise, x=x)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank; none where there is no such file."""
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def init_folder(init: str | Path | None) -> Path:
    """The pipeline folder that a run starts from: the bundled model's where none was given."""
    from sidestep.models import BUNDLED

    return BUNDLED["emoji-sd"] if init is None else Path(init)


def check_folders(init: Path, out: Path, parts: Sequence[str] = PARTS) -> None:
    """Refuses folders that cannot be read or should not be written, before any work is done.

    Raises:
        UserError: `init` is no pipeline, or `out` is something else already or cannot be written.
    """
    missing = [name for name in parts if not (init / name).is_dir()]
    if missing or not (init / "model_index.json").is_file():
        lacks = missing[0] if missing else "model_index.json"
        raise UserError(f"{init}: not the pipeline folder to start from, it has no {lacks}")
    if out.exists() and not (out / "model_index.json").is_file():
        raise UserError(f"{out}: exists and is not a pipeline folder; choose another out")
    if out.resolve() == init.resolve():
        raise UserError(f"{out}: out is the folder the training starts from; choose another out")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: the folder {out.parent} does not exist or cannot be written")


def load_models(init: Path, from_scratch: bool) -> tuple[nn.Module, nn.Module]:
    """UNet and text encoder in fp32: with the folder's weights, or random ones of the same shape.

    Raises:
        UserError: diffusers or transformers cannot load the folder.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet: Any
    text: Any
    try:
        if from_scratch:
            config = UNet2DConditionModel.load_config(init, subfolder="unet")
            unet = UNet2DConditionModel.from_config(config)
            text = CLIPTextModel(CLIPTextConfig.from_pretrained(init, subfolder="text_encoder"))
        else:
            unet = UNet2DConditionModel.from_pretrained(init, subfolder="unet")
            text = CLIPTextModel.from_pretrained(init, subfolder="text_encoder")
    except (OSError, ValueError) as error:
        raise UserError(f"{init}: cannot load the pipeline: {error}") from error
    return unet.float().to(memory_format=torch.channels_last).train(), text.float().train()


def load_text_encoder(init: Path) -> nn.Module:
    """The folder's text encoder in fp32, for use as it is.

    Raises:
        UserError: transformers cannot load it.
    """
    from transformers import CLIPTextModel

    try:
        text: Any = CLIPTextModel.from_pretrained(init, subfolder="text_encoder")
    except (OSError, ValueError) as error:
        raise UserError(f"{init}: cannot load the text encoder: {error}") from error
    return text.float().eval()


def pipeline_index(init: Path, pipeline: str, models: Mapping[str, Any]) -> dict[str, Any]:
    """The `model_index.json` of these models beside all of `init` but its UNet."""
    old = json.loads((init / "model_index.json").read_text(encoding="utf-8"))
    index = {name: old[name] for name in ("_diffusers_version", *PARTS) if name != "unet"}
    parts = {name: ["diffusers", type(model).__name__] for name, model in models.items()}
    return {"_class_name": pipeline, **index, **parts}


def load_alphas(init: Path) -> Tensor:  # [T] fp32
    """The scheduler's cumulative products abar_t."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_pretrained(init, subfolder="scheduler").alphas_cumprod.float()


@torch.no_grad()
def encode(init: Path, examples: Sequence[Example], shares: dict[str, float]) -> Encoded:
    """Encodes every picture with the VAE and every caption with the tokenizer, once.

    Args:
        init: Pipeline folder.
        examples: N examples.
        shares: The share of each group (`focus` are the plain pictures in focus) in what is drawn;
            groups without examples leave theirs to the others.
    """
    from diffusers import AutoencoderTiny
    from transformers import CLIPTokenizer

    vae = AutoencoderTiny.from_pretrained(init, subfolder="vae").eval()
    vae = vae.to(memory_format=torch.channels_last)
    latents = []
    for begin in range(0, len(examples), 64):
        stack = [torch.from_numpy(one.picture) for one in examples[begin : begin + 64]]
        pictures = torch.stack(stack).permute(0, 3, 1, 2).float() / 127.5 - 1  # [n, 3, 64, 64]
        latents.append(vae.encode(pictures).latents * vae.config.scaling_factor)
    tokenizer = CLIPTokenizer.from_pretrained(init, subfolder="tokenizer")

    def tokenize(captions: list[str]) -> Tensor:  # [n, L] int64
        padded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return padded.input_ids

    groups = ["focus" if one.focus and one.group == "plain" else one.group for one in examples]
    counts = {group: groups.count(group) for group in set(groups)}
    return Encoded(
        latents=torch.cat(latents).contiguous(),
        tokens=tokenize([one.caption for one in examples]),
        empty=tokenize([""])[0],
        weights=torch.tensor([shares[group] / counts[group] for group in groups]).double(),
    )


def save_pipeline(
    init: Path,
    out: Path,
    models: Mapping[str, Any],
    captions: Sequence[str],
    card: str,
    *,
    configs: Collection[str] = (),
    tokenizer: Any = None,
    index: Mapping[str, Any] | None = None,
    limit: int = SIZE_LIMIT,
) -> None:
    """Writes a complete half-precision pipeline to `out`: first beside it, then by renaming.

    Args:
        init: Pipeline folder that all the rest is copied from, the prompt files included.
        out: Folder to write or to replace.
        models: The weights, by part.
        captions: Become `captions-all.txt`.
        card: Becomes the README.
        configs: The models whose configs are written too, where `init` has others or none.
        tokenizer: In place of that of `init`.
        index: `model_index.json` in place of that of `init`, whose other parts are left out.
        limit: The bytes that may be bundled.

    Raises:
        UserError: The folder would be larger than the limit.
    """
    left_out = {name for name in PARTS if index is not None and name not in index}
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    new = beside / "new"
    try:
        for source in sorted(init.rglob("*")):
            inside = source.relative_to(init)
            target = new / inside
            if source.is_file() and not left_out.union({"__pycache__"}) & {*inside.parts}:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        for name, model in models.items():
            if name in configs:
                model.save_config(new / name)
            _save_half(model, new / name)
        if index is not None:
            text = json.dumps(dict(index), indent=2, sort_keys=True)
            (new / "model_index.json").write_text(text + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.rmtree(new / "tokenizer")
            tokenizer.save_pretrained(new / "tokenizer")
        (new / "captions-all.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        (new / "README.md").write_text(card, encoding="utf-8")
        size = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        if size > limit:
            raise UserError(f"{out}: the pipeline takes {size} bytes, expected {limit} at most")
        if out.exists():
            out.rename(beside / "old")
        new.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _save_half(model: nn.Module, folder: Path) -> None:
    """Replaces the weights; the config stays as it is, and they load as float32 by default."""
    from safetensors.torch import save

    path = next(folder.glob("*.safetensors"), folder / "diffusion_pytorch_model.safetensors")
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(save(state, metadata={"format": "pt"}))
