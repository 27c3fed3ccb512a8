"""How the latents that a scheduler steps lie in the model's input and output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.adapters.capture import CannotCapture
from sidestep.runtime.denoisers import cut


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Between the scheduler's latents ``[S, ...]`` and rows ``[R, ...]`` as the model has them.

    Attributes:
        frames: Where the scheduler has every frame of a video as a row of its own, their number.
        place: The model's dimension that they are along.
        copies: The scheduler steps that many copies of every row (DiT's guidance).
    """

    frames: int = 0
    place: int = 2
    copies: int = 1

    @staticmethod
    def between(latents: Tensor, sample: Tensor) -> Layout:
        """Of the scheduler's latents ``[S, ...]`` and a model's input ``[batch, ...]``.

        Raises:
            CannotCapture: One cannot be found in the other.
        """
        if latents.dim() == sample.dim():
            return Layout()
        if sample.dim() == 5 and latents.dim() == 4 and latents.shape[2:] == sample.shape[3:]:
            for place, channels in ((2, 1), (1, 2)):
                fits = sample.shape[channels] >= latents.shape[1]
                if fits and len(latents) % sample.shape[place] == 0:
                    return Layout(frames=sample.shape[place], place=place)
        raise CannotCapture(
            f"enable: the scheduler steps latents {list(latents.shape)} and the model reads "
            f"{list(sample.shape)}; the whole-trajectory driver needs one to be part of the other, "
            "use driver='stepwise'"
        )

    def inward(self, latents: Tensor) -> Tensor:  # [S, ...] -> [R, ...]
        """Rows as the model has them."""
        if self.frames:
            latents = latents.unflatten(0, (-1, self.frames)).movedim(1, self.place)
        return latents[: len(latents) // self.copies]

    def outward(self, rows: Tensor) -> Tensor:  # [R, ...] -> [S, ...]
        """Latents as the scheduler has them."""
        latents = torch.cat([rows] * self.copies)
        return latents.movedim(self.place, 1).flatten(0, 1) if self.frames else latents


def is_doubled(x: Tensor) -> bool:
    """Whether the second half of the rows repeats the first, as in DiT's guidance."""
    half = len(x) // 2
    return len(x) % 2 == 0 and torch.equal(x[:half], x[half:])


def find_region(
    sample: Tensor,  # [batch, ...]
    x: Tensor,  # [R, ...]
) -> tuple[int, int] | None:
    """``(dim, start)`` of the latents in a model's input that has more than them, else None.

    Args:
        sample: The model's input: blocks of R lines.
        x: The latents, scaled as the model is to read them.

    Raises:
        CannotCapture: They are not in it.
    """
    if len(sample) % len(x) == 0 and sample.dim() == x.dim():
        extra = [d for d in range(1, x.dim()) if sample.shape[d] != x.shape[d]]
        if not extra and _holds(sample, x):
            return None
        if len(extra) == 1 and sample.shape[extra[0]] > x.shape[extra[0]]:
            dim, size = extra[0], x.shape[extra[0]]
            for start in (0, sample.shape[dim] - size):
                if _holds(sample.narrow(dim, start, size), x):
                    return dim, start
    raise CannotCapture(
        f"enable: the model's input {list(sample.shape)} does not hold the latents "
        f"{list(x.shape)} as the scheduler scales them; the whole-trajectory driver cannot take "
        "this pipeline over, use driver='stepwise'"
    )


def _holds(sample: Tensor, x: Tensor) -> bool:
    """Whether every block of ``sample`` is ``x``, up to rounding."""
    eps = torch.finfo(sample.dtype).eps
    scale = float(x.abs().max())
    blocks = sample.split(len(x))
    return all(bool(((b - x).abs() <= 8 * eps * scale).all()) for b in blocks)


def without_latents(sample: Tensor, x: Tensor, region: tuple[int, int]) -> Tensor:
    """The model's input with zeros in the place of the latents, a copy."""
    around = sample.detach().clone()
    around.narrow(region[0], region[1], x.shape[region[0]]).zero_()
    return around


def blocks_of(output: Tensor, rows: int, shape: torch.Size) -> list[Tensor]:
    """The parts ``[R, *shape]`` of a model's output ``[batch, ...]``, block by block.

    Raises:
        CannotCapture: It has no room for the latents.
    """
    fits = output.dim() == len(shape) + 1 and all(
        have >= want for have, want in zip(output.shape[1:], shape, strict=True)
    )
    if not fits:
        raise CannotCapture(
            f"enable: the model returns {list(output.shape)} for latents {[rows, *shape]}; the "
            "whole-trajectory driver cannot take this pipeline over, use driver='stepwise'"
        )
    return list(cut(output, shape).split(rows))
