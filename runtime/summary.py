"""What a generation cost, and why: the numbers behind `Handle.summary`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def nothing_skipped(
    reasons: Iterable[Sequence[str]], criterion: Iterable[Sequence[float]] = ()
) -> str:
    """Says so, how often for which reason, and how small the criterion was.

    Args:
        reasons: Those of `Summary`.
        criterion: Likewise.
    """
    counts = Counter(reason for row in reasons for reason in row)
    why = ", ".join(f"{count} by {reason}" for reason, count in counts.most_common())
    known = [value for row in criterion for value in row if not math.isnan(value)]
    lowest = f"; smallest criterion {min(known):.3g}" if known else ""
    return f"nothing was skipped: of {sum(counts.values())} calls {why or 'none'}{lowest}"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The last generation, image by image.

    Attributes:
        method: The settings that made it.
        nfe: ``[images]`` model evaluations of each image; a guidance pair counts as one.
        ticks: Sequential model calls.
        steps: Scheduler steps.
        skip_map: ``[images][steps]``, True where the model was called.
        reasons: ``[images][steps]``: "skipped", or why it was not: "warm-up", "criterion", "cap",
            "last", "serial" (no method), "every" (the method skips none), "budget" (of `EarlyExit`,
            spent), "output hidden" (from the criterion); where a row could have skipped and had
            nothing to skip with, "no output to reuse", "batch changed", "prompt changed", "gradient
            wanted", "no batch found" (among the model's arguments) or "no place for the offset" (in
            its output).
        criterion: ``[images][steps]``, the number that decided the step, NaN where none did.
        note: Why nothing was skipped, or what else is to be known; empty if nothing is.
        iterations: ``[images]`` of SRDS, after which each was done; -1 where it was not. Empty
            without SRDS, whose images have no ``skip_map``, ``reasons`` and ``criterion``.
        errors: ``[images]`` of SRDS, root mean square of the error in the latents, estimated.
        image_ticks: ``[images]`` of SRDS, sequential model calls of each image.
        graphs: Of the whole-trajectory driver on a CUDA device: how many CUDA graphs it captured
            and how often it replayed one, or why there were none; empty elsewhere.
        layers: ``[images][steps]`` of `EarlyExit`, blocks that the model has run, in the mean over
            the guidance branches; 0 where it was not called. Empty without.
        blocks: All blocks of the model.
    """

    method: str
    nfe: tuple[float, ...]
    ticks: int
    steps: int
    skip_map: tuple[tuple[bool, ...], ...] = ()
    reasons: tuple[tuple[str, ...], ...] = ()
    criterion: tuple[tuple[float, ...], ...] = ()
    note: str = ""
    iterations: tuple[int, ...] = ()
    errors: tuple[float, ...] = ()
    image_ticks: tuple[int, ...] = ()
    graphs: str = ""
    layers: tuple[tuple[float, ...], ...] = ()
    blocks: int = 0

    @property
    def mean_depth(self) -> float:
        """Blocks a step of an image, in the mean; NaN without `layers`."""
        flat = [depth for row in self.layers for depth in row]
        return sum(flat) / len(flat) if flat else math.nan

    def __str__(self) -> str:
        """One line for the generation and one for each image."""
        lines = [self.method]
        if self.nfe:
            mean = sum(self.nfe) / len(self.nfe)
            # SRDS makes more of them, side by side
            fewer = "" if self.iterations else f" ({self.steps / mean:.2f}x fewer)"
            lines[0] += (
                f": {self.steps} steps, {len(self.nfe)} images, {mean:.1f} model calls per image"
                f"{fewer}, {self.ticks} sequential calls"
            )
        if self.layers:
            share = self.mean_depth / self.blocks
            lines[0] += f", {self.mean_depth:.1f} of {self.blocks} blocks a step ({share:.0%})"
        for i, (called, reasons) in enumerate(zip(self.skip_map, self.reasons, strict=True)):
            marks = "".join("#" if call else "." for call in called)
            counts = Counter(reasons)
            why = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            lines.append(f"  image {i}  {marks}  {self.nfe[i]:.0f} calls: {why}")
        for i, (count, error, ticks) in enumerate(
            zip(self.iterations, self.errors, self.image_ticks, strict=True)
        ):
            lines.append(
                f"  image {i}  {count} iterations, {ticks} sequential calls "
                f"({self.steps / max(1, ticks):.2f}x fewer), {self.nfe[i]:.0f} in all, "
                f"estimated error {error:.1g}"
            )
        if self.graphs:
            lines.append(f"  CUDA graphs: {self.graphs}")
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join(lines)
