"""The grid of pictures (plain pipeline above method, per prompt) and the chart of model calls."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten, wrap
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from sidestep.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#2563eb", "#f59e0b", "#d9dee7", "#1f2937"


FORMATS = (".png", ".pdf", ".svg", ".jpg")


def check_writable(path: Path, formats: Sequence[str] = FORMATS) -> None:
    """Refuses, before any work is done, a file that cannot be written; a picture if none is said.

    Raises:
        UserError: The folder does not exist or cannot be written, the path is a folder, or its
            format is unknown.
    """
    if path.is_dir():
        raise UserError(f"--out: {path} is a folder, expected a file name")
    if path.suffix.lower() not in formats:
        raise UserError(f"--out: {path} ends in {path.suffix!r}, expected {', '.join(formats)}")
    _check_folder(path, path.absolute().parent)


def check_folder(folder: Path) -> None:
    """Refuses, before any work is done, a folder that cannot be created or written.

    Raises:
        UserError: It is a file, or the nearest folder that exists cannot be written.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    _check_folder(folder, existing)


def _check_folder(path: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{folder} is not a writable folder ({error.strerror})"
        raise UserError(f"--out: cannot write {path}, {reason}") from error


def save_figure(figure: Figure, path: Path) -> None:
    """Writes through a temporary file, so that no half picture is ever left."""
    import matplotlib.pyplot as plt

    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix or '.png'}")
    try:
        figure.savefig(
            partial,
            dpi=150,
            facecolor="white",
            bbox_inches="tight",
            format=path.suffix[1:] or "png",
        )
        partial.replace(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--out: cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
        plt.close(figure)


def save_image(image: Tensor, path: Path) -> None:
    """Writes one picture, ``[3, H, W]`` in [0, 1], through a temporary file."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix or '.png'}")
    try:
        Image.fromarray(pixels).save(partial, format="PNG" if not path.suffix else None)
        partial.replace(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--out: cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def picture_grid(
    rows: Sequence[tuple[str, Tensor]],  # (label, [N, 3, H, W])
    prompts: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    columns: int = 8,
) -> Figure:
    """Pictures of several runs under each other, a column per prompt, in bands of ``columns``.

    Args:
        rows: One label and ``[N, 3, H, W]`` pictures in [0, 1] per run.
        prompts: N prompts, written above each column.
        captions: For each run N short texts (such as the calls made), written below.
        columns: Pictures side by side before a new band begins.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(prompts)
    columns = min(columns, count)
    bands = -(-count // columns)
    # A band is its pictures and, below them, room for the titles of the next.
    heights = ([1.12] * len(rows) + [0.25]) * bands
    width = 1.15 * columns + 1.0
    figure = plt.figure(figsize=(width, sum(heights)))
    places = figure.add_gridspec(
        len(heights), columns, height_ratios=heights, left=0.9 / width, right=0.99, top=0.97,
        bottom=0.02, wspace=0.08, hspace=0.25,
    )  # fmt: skip
    for i in range(count):
        band, column = divmod(i, columns)
        for r, (label, images) in enumerate(rows):
            axis = figure.add_subplot(places[band * (len(rows) + 1) + r, column])
            axis.set_axis_off()
            axis.imshow(np.clip(images[i].permute(1, 2, 0).float().cpu().numpy(), 0, 1))
            if r == 0:
                title = "\n".join(wrap(shorten(prompts[i], 40, placeholder=" ..."), 18))
                axis.set_title(title, fontsize=6.5, color=INK, pad=3)
            if captions is not None and captions[r]:
                axis.text(0.5, -0.03, captions[r][i], transform=axis.transAxes, ha="center",
                          va="top", fontsize=6, color="#4b5563")  # fmt: skip
            if column == 0:
                axis.text(-0.08, 0.5, label, transform=axis.transAxes, ha="right", va="center",
                          fontsize=7, color=INK)  # fmt: skip
    return figure


def calls_chart(
    called: np.ndarray,  # [images, steps] bool
    criterion: np.ndarray,  # [images, steps] float, NaN where there is none
    threshold: float,
    prompts: Sequence[str],
) -> Figure:
    """Which steps called the model, per image, above the criterion that decided it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    images, steps = called.shape
    tall = max(1.2, min(0.16 * images, 6.0))
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, tall + 3.2), sharex=True, layout="constrained",
        gridspec_kw={"height_ratios": [tall, 2.2]},
    )  # fmt: skip
    top.pcolormesh(np.arange(steps + 1), np.arange(images + 1), called.astype(float),
                   cmap=ListedColormap([GREY, BLUE]), vmin=0, vmax=1,
                   edgecolors="white", linewidth=0.4)  # fmt: skip
    top.set_ylim(images, 0)
    if images <= 40:
        labels = [
            f"{shorten(p, 28, placeholder=' ...')}  {n}"
            for p, n in zip(prompts, called.sum(1), strict=True)
        ]
        top.set_yticks(np.arange(images) + 0.5, labels, fontsize=6)
    else:
        top.set_ylabel("image", fontsize=8)
        top.tick_params(labelsize=7)
    top.set_title(f"model calls per image: mean {called.sum(1).mean():.1f} of {steps}", fontsize=9)
    handles = [Patch(color=BLUE, label="model called"), Patch(color=GREY, label="reused")]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=7, frameon=False)
    x = np.arange(steps) + 0.5
    for row in criterion:
        bottom.plot(x, np.where(row > 0, row, np.nan), color=BLUE, alpha=0.25, linewidth=0.7)
    bottom.axhline(threshold, color=ORANGE, linewidth=1.2, label=f"threshold {threshold:g}")
    bottom.set(yscale="log", xlabel="step", xlim=(0, steps))
    bottom.set_ylabel("criterion", fontsize=8)
    bottom.legend(fontsize=7, frameon=False)
    bottom.tick_params(labelsize=7)
    for side in ("top", "right"):
        bottom.spines[side].set_visible(False)
        top.spines[side].set_visible(False)
    return figure
