"""Pictures for training the bundled emoji model: loading, held-out filter, recolouring, placing.

Everything here works on Noto emoji as the npm package `emoji-datasource-google` ships them. The
picture functions take and return straight-alpha RGBA arrays in [0, 1]; only `on_white` drops alpha.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sidestep.errors import UserError

SIDE = 64
PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"
PALETTE = {
    "red": (0.88, 0.16, 0.16),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (1.00, 0.86, 0.20),
    "golden": (0.90, 0.70, 0.12),
    "green": (0.25, 0.68, 0.24),
    "blue": (0.16, 0.46, 0.92),
    "purple": (0.56, 0.26, 0.80),
    "pink": (0.98, 0.50, 0.72),
    "brown": (0.50, 0.32, 0.20),
    "black": (0.15, 0.15, 0.16),
    "white": (0.92, 0.92, 0.93),
    "grey": (0.55, 0.56, 0.58),
}
STOP_WORDS = {"a", "an", "and", "in", "of", "on", "the", "with", "slice"}


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One emoji: its caption, the aliases people type, and its picture."""

    name: str
    aliases: tuple[str, ...] = ()
    category: str = ""
    subcategory: str = ""
    picture: np.ndarray = field(repr=False)  # [64, 64, 4] float32 in [0, 1], straight alpha

    def words(self) -> set[str]:
        """Every word of the name and the aliases, for the held-out filter."""
        return words(" ".join((self.name, *self.aliases)))


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training pair; `group` is plain, moved, coloured or collage, `focus` as in `Mix`."""

    caption: str
    group: str
    picture: np.ndarray = field(repr=False)  # [64, 64, 3] uint8, on white
    focus: bool = False


def words(text: str) -> set[str]:
    """Lower-cased words without digits (`train2` reads `train`)."""
    return set(re.findall(r"[a-z]+", text.lower()))


def load_emoji(folder: str | Path) -> list[Emoji]:
    """Reads the unpacked npm package.

    Args:
        folder: where `emoji.json` lies, or a folder that holds it as `package/`.

    Returns:
        Every emoji with an image, skin-tone variants left out, in the package's order.

    Raises:
        UserError: The package is not there, or a file in it cannot be read.
    """
    root = Path(folder)
    root = root / "package" if (root / "package").is_dir() else root
    index, pictures = root / "emoji.json", root / "img" / "google" / str(SIDE)
    if not index.is_file() or not pictures.is_dir():
        raise UserError(
            f"{folder}: the npm package {PACKAGE} is not unpacked here; run "
            f"`npm pack {PACKAGE}@{VERSION} && tar xzf {PACKAGE}-{VERSION}.tgz` in this folder"
        )
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        return [_read(entry, pictures) for entry in entries if entry["has_img_google"]]
    except (OSError, KeyError, TypeError, ValueError, UnidentifiedImageError) as error:
        raise UserError(f"{root}: cannot read the emoji package: {error}") from error


def _read(entry: dict, pictures: Path) -> Emoji:
    with Image.open(pictures / entry["image"]) as image:
        picture = image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    name = (entry["name"] or entry["short_name"]).lower()
    short = (re.sub(r"[_0-9]+", " ", s).strip().lower() for s in entry["short_names"])
    aliases = tuple(s for s in dict.fromkeys(short) if s and s != name and len(words(s)) <= 3)
    return Emoji(
        name=name,
        aliases=aliases,
        category=entry["category"],
        subcategory=entry.get("subcategory") or "",
        picture=np.asarray(picture, np.float32) / 255,
    )


class HeldOut:
    """Decides whether a caption would give away a prompt of the test set.

    A prompt is given away when all its content words occur together. `face` counts only where one
    word would be left, so that `blue tiger face` also keeps `blue tiger` out of the training set.
    """

    def __init__(self, prompts: Iterable[str]) -> None:
        self.prompts = {prompt.strip().lower() for prompt in prompts if prompt.strip()}
        self._keys = [self._key(prompt) for prompt in self.prompts]

    @staticmethod
    def _key(prompt: str) -> frozenset[str]:
        content = words(prompt) - STOP_WORDS
        short = content - {"face"}
        return frozenset(short if len(short) >= 2 else content)

    def gives_away(self, caption: str, sources: Sequence[Emoji] = ()) -> bool:
        """True when the caption, or the caption with all names of its pictures, holds a prompt."""
        said = words(caption).union(*(source.words() for source in sources))
        return caption.lower() in self.prompts or any(key <= said for key in self._keys)


def on_white(picture: np.ndarray) -> np.ndarray:  # [64, 64, 4] -> [64, 64, 3] uint8
    """Composites a straight-alpha picture on white."""
    alpha = picture[..., 3:]
    return np.round(255 * (picture[..., :3] * alpha + 1 - alpha)).astype(np.uint8)


def recolour(picture: np.ndarray, colour: str) -> np.ndarray:  # [64, 64, 4] -> [64, 64, 4]
    """Paints the picture's main material in a named colour and keeps its shading.

    The main material is what is saturated; pictures that are mostly grey are painted whole. The
    shade of a pixel runs from black through the colour to white along its luminance, centred so
    that the material's mean luminance gets the colour itself.
    """
    rgb, alpha = picture[..., :3], picture[..., 3]
    luminance = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    high, low = rgb.max(-1), rgb.min(-1)
    saturation = (high - low) / np.maximum(high, 0.05)
    material = np.clip((saturation - 0.12) / 0.2, 0, 1)
    if (material * alpha).sum() < 0.45 * alpha.sum():
        material = np.ones_like(material)
    weight = material * alpha
    centre = (luminance * weight).sum() / max(weight.sum(), 1e-6)
    target = np.array(PALETTE[colour], np.float32)
    light = np.clip(0.85 * (luminance - centre), -0.5, 0.5)[..., None]
    dark_side = target * (1 + 1.6 * np.minimum(light, 0))
    painted = dark_side + (1 - dark_side) * 1.3 * np.maximum(light, 0)
    mixed = rgb + material[..., None] * (np.clip(painted, 0, 1) - rgb)
    return np.concatenate([mixed, picture[..., 3:]], -1)


def place(
    canvas: np.ndarray,  # [64, 64, 4], drawn on
    picture: np.ndarray,  # [64, 64, 4]
    size: int,
    left: int,
    top: int,
) -> None:
    """Draws the picture over the canvas at `size` pixels; what falls outside is cut off."""
    image = Image.fromarray(np.round(picture * 255).astype(np.uint8), "RGBA")
    layer = Image.new("RGBA", (SIDE, SIDE))
    layer.paste(image.resize((size, size), Image.Resampling.LANCZOS), (left, top))
    over = np.asarray(layer, np.float32) / 255
    alpha = over[..., 3:] + canvas[..., 3:] * (1 - over[..., 3:])
    colour = over[..., :3] * over[..., 3:] + canvas[..., :3] * canvas[..., 3:] * (1 - over[..., 3:])
    canvas[..., :3] = colour / np.maximum(alpha, 1e-6)
    canvas[..., 3:] = alpha


def moved(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:  # [64, 64, 4] both
    """A slightly smaller picture, shifted a little."""
    canvas = np.zeros_like(picture)
    size = int(rng.integers(50, 65))
    left, top = (int(rng.integers(0, SIDE - size + 1)) for _ in range(2))
    place(canvas, picture, size, left, top)
    return canvas


def features(face: np.ndarray) -> np.ndarray:  # [64, 64, 4] -> [64, 64, 4]
    """The eyes and mouth of a yellow face emoji: its disc is made transparent."""
    red, green, blue = (face[..., i] for i in range(3))
    skin = (red > 0.75) & (green > 0.45) & (blue < 0.62) & (red - blue > 0.3)
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    inside = x**2 + y**2 < (0.40 * SIDE) ** 2
    cut = face.copy()
    cut[..., 3] *= inside & ~skin
    return cut


def mean_colour(picture: np.ndarray) -> str:  # [64, 64, 4]
    """The palette name nearest to the alpha-weighted mean colour."""
    weight = picture[..., 3:]
    mean = (picture[..., :3] * weight).sum((0, 1)) / max(weight.sum(), 1e-6)
    return min(PALETTE, key=lambda name: float(((mean - PALETTE[name]) ** 2).sum()))
