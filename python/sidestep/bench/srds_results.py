"""One entry of ``sidestep bench srds``: its images, batch by batch, and what they come to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sidestep.bench.srds_picard import ParaDiGMS
from sidestep.metrics import latent_rms, mean_psnr, percentile, psnr, ssim
from sidestep.runtime.methods.srds import SRDS
from sidestep.sampling import Run

Entry = dict[str, Any]

GOOD = 40.0
"""PSNR to the serial picture, in dB, that counts as the same: root mean square 1% of the range."""

ROUNDING = 1e-4
"""Root mean square by which latents differ that were made in batches of other sizes."""

_CAP = 100.0  # dB of a picture that equals the serial one


@dataclass(frozen=True)
class GuidanceSplit:
    """The serial sampler with each of the two guidance branches on a process of its own."""


Way = SRDS | ParaDiGMS | GuidanceSplit
"""What is measured beside the serial sampler."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """Some pictures, by whatever method.

    Attributes:
        images: ``[n, 3, H, W]`` in [0, 1].
        latents: ``[n, C, h, w]``.
        iterations: n of them.
        ticks: n sequential model calls of each image.
        nfe: n model evaluations of each image.
        estimates: n errors as the method estimates them, None where it does not.
        seconds: Wall-clock of all of it.
    """

    images: Tensor
    latents: Tensor
    iterations: list[int]
    ticks: list[int]
    nfe: list[float]
    estimates: list[float] | None
    seconds: float

    @staticmethod
    def of(run: Run) -> Made:
        """What SRDS has made."""
        return Made(
            images=run.images, latents=run.latents, iterations=run.iterations,
            ticks=run.image_ticks, nfe=run.nfe, estimates=run.errors, seconds=sum(run.seconds),
        )  # fmt: skip


def label_of(method: Way | None) -> str:
    """The method in tables: ``serial``, ``SRDS krylov``, ``SRDS hold log-snr``, ``ParaDiGMS 1``."""
    if method is None:
        return "serial"
    if isinstance(method, GuidanceSplit):
        return "guidance split"
    if isinstance(method, SRDS):
        spacing = "" if method.spacing == "steps" else f" {method.spacing}"
        most = "" if method.max_iterations is None else f" max {method.max_iterations}"
        return f"SRDS {method.coarse}{spacing}{most}"
    return f"ParaDiGMS {method.tolerance:g}"


def new_entry(
    name: str, steps: int, method: Way, *, solver: str, batch: int, processes: int = 1
) -> Entry:
    """One entry of the document, without any images.

    Args:
        name: Of the prompt set.
        steps: Of the sampler.
        method: What is run.
        solver: The scheduler, as the command line names it.
        batch: Prompts at once.
        processes: That make every picture together.
    """
    label, _, setting = label_of(method).partition(" ")
    images: dict[str, list[float]] = {
        key: []
        for key in ("index", "iterations", "ticks", "nfe", "psnr", "ssim", "error", "estimate")
    }
    batches: dict[str, list[float]] = {
        key: [] for key in ("first", "images", "seconds", "plain_seconds")
    }
    return {
        "set": name, "steps": steps, "method": label.lower(), "setting": setting,
        "settings": repr(method), "solver": solver, "batch": batch,
        "processes": processes, "images": images, "batches": batches,
    }  # fmt: skip


def key_of(entry: Entry) -> tuple[Any, ...]:
    """What makes it another entry than others."""
    return tuple(entry[name] for name in ("set", "steps", "method", "setting", "processes"))


def enter(entry: Entry, made: Made, serial: Run, first: int) -> None:
    """Adds a batch of pictures to an entry, judged by the serial ones, and sums it up anew."""
    images, batches, count = entry["images"], entry["batches"], len(made.images)
    images["index"] += range(first, first + count)
    images["iterations"] += made.iterations
    images["ticks"] += made.ticks
    images["nfe"] += made.nfe
    decibels = psnr(made.images, serial.images)
    images["psnr"] += [round(min(value, _CAP), 3) for value in decibels]
    images["ssim"] += [round(value, 5) for value in ssim(made.images, serial.images)]
    errors = latent_rms(made.latents, serial.latents)
    images["error"] += [float(f"{value:.4g}") for value in errors]
    images["estimate"] += [float(f"{value:.4g}") for value in made.estimates or []]
    batches["first"].append(first)
    batches["images"].append(count)
    batches["seconds"].append(round(made.seconds, 4))
    batches["plain_seconds"].append(round(sum(serial.seconds), 4))
    entry.update(summary(entry))


def summary(entry: Entry) -> dict[str, Any]:
    """What an entry says of all its images.

    Returns:
        ``depth``, the mean over the images of steps / ticks; ``good``, the share of them of at
        least `GOOD` dB; ``exact``, the share that equals the serial latents bit for bit;
        ``honest``, the share whose estimated error bounds the true one (None without estimates);
        seconds of a full batch and the ratio to the serial sampler's; and means of the rest.
    """
    images, batches = entry["images"], entry["batches"]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    bounded = [
        error <= max(estimate, ROUNDING)
        for error, estimate in zip(images["error"], images["estimate"], strict=False)
    ]
    full = max(batches["images"])
    seconds, plain = (
        statistics.median(
            value for value, n in zip(batches[name], batches["images"], strict=True) if n == full
        )
        for name in ("seconds", "plain_seconds")
    )
    decibels = images["psnr"]
    return {
        "prompts": len(decibels),
        "iterations": mean(images["iterations"]),
        "ticks": mean(images["ticks"]),
        "nfe": mean(images["nfe"]),
        "depth": mean([entry["steps"] / ticks for ticks in images["ticks"]]),
        "good": mean([value >= GOOD for value in decibels]),
        "exact": mean([error == 0 for error in images["error"]]),
        "honest": mean(bounded) if bounded else None,
        "psnr": mean_psnr(decibels, _CAP),
        "psnr_p5": percentile(decibels, 0.05),
        "psnr_p10": percentile(decibels, 0.1),
        "ssim": mean(images["ssim"]),
        "seconds": seconds,
        "plain_seconds": plain,
        "speedup": plain / seconds,
    }
