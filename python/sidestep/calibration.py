"""Chooses a method's threshold so that a promise holds: ``psnr>=35`` for 90 % of pictures.

Pictures of the full run are made from n pairs of prompt and seed, and then, threshold by threshold
from the smallest on, the method's from the same noise. A picture that misses the target counts as
lost, at this threshold and all larger ones, and conformal risk control says how far one may go
(`sidestep.conformal`); the first threshold that it refuses ends the search, as all larger ones
would be refused as well. The threshold chosen is then tried on as many pictures of the same prompts
from fresh seeds, which is what is reported as kept.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sidestep import conformal, metrics
from sidestep.adapters.calibrated import model_dtype, model_hash, scheduler_record
from sidestep.adapters.catalogue import make_scheduler
from sidestep.errors import UserError
from sidestep.runtime.calibration import Calibration, recorded
from sidestep.sampling import Job, Run, run_jobs

MEASURES: dict[str, Callable[[Tensor, Tensor], list[float]]] = {
    "psnr": metrics.psnr,
    "ssim": metrics.ssim,
}
FACTORS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8)
"""Thresholds tried where none are given: the method's own times these."""


@dataclass(frozen=True)
class Target:
    """What a picture has to keep to the full run.

    Attributes:
        measure: A name in `MEASURES`; larger is better.
        least: The value to be reached.
    """

    measure: str
    least: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """``psnr>=35``.

        Raises:
            UserError: It is not of that form.
        """
        found = re.fullmatch(r"\s*(\w+)\s*>=\s*([0-9.]+)\s*", text)
        if found is None or found[1] not in MEASURES or found[2].count(".") > 1:
            known = " or ".join(f"{name}>=NUMBER" for name in MEASURES)
            raise UserError(f"--target: got {text!r}, expected {known}, such as psnr>=35")
        return cls(found[1], float(found[2]))

    def lost(self, run: Run, plain: Run) -> list[bool]:
        """Of each picture, whether it misses the target (NaN does)."""
        values = MEASURES[self.measure](run.images, plain.images)
        return [not value >= self.least for value in values]

    def __str__(self) -> str:
        """As it is written."""
        return f"{self.measure}>={self.least:g}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked for, and of what.

    Attributes:
        target: Of every picture.
        confidence: Share of pictures that are to keep it, above 0 and below 1.
        method: Settings with a ``threshold``, a frozen dataclass.
        thresholds: To choose among; empty for the method's own times `FACTORS`.
        model: The model's name or folder.
        solver: As in `Job`.
        grid: As in `Job`.
        steps: As in `Job`.
        guidance: The scale.
        images: To calibrate on, and as many again to check.
        seed: Of the first picture, and of the order of the prompts.
        batch: Images a model call.
    """

    target: Target
    confidence: float
    method: Any
    thresholds: Sequence[float] = ()
    model: str = "emoji-sd"
    solver: str | None = None
    grid: str | None = None
    steps: int = 50
    guidance: float = 7.5
    images: int = 64
    seed: int = 0
    batch: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise UserError(f"--confidence: got {self.confidence:g}, expected above 0 and below 1")
        least = conformal.fewest(1 - self.confidence)
        if self.images < least:
            raise UserError(
                f"--images: got {self.images}, expected at least {least} for a confidence of "
                f"{self.confidence:g}"
            )
        if not all(threshold > 0 for threshold in self.thresholds):
            raise UserError(f"--threshold: got {min(self.thresholds):g}, expected more than 0")

    @property
    def candidates(self) -> list[float]:
        """The thresholds to choose among, ascending."""
        own = [float(f"{factor * self.method.threshold:.3g}") for factor in FACTORS]
        return sorted(set(self.thresholds or own))


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    question: Question,
    on_step: Callable[[str], None] | None = None,
) -> Calibration:
    """Chooses the threshold, and tries it on fresh seeds.

    Args:
        pipe: A text-to-image pipeline.
        prompts: Of the kind that the promise is for; the more of them, the better.
        question: What is asked for.
        on_step: Called after every step, for a progress bar.

    Raises:
        UserError: No threshold keeps the promise, or the pipeline and the method do not fit.
    """
    chosen = draw(prompts, question.images, question.seed)
    make = _maker(pipe, question, on_step)
    (plain,) = make([None], chosen, question.seed)
    curve: list[dict[str, float]] = []
    losses: list[list[bool]] = []
    alpha, best = 1 - question.confidence, None
    for threshold in question.candidates:
        (run,) = make([threshold], chosen, question.seed)
        losses.append(question.target.lost(run, plain))
        curve.append(_point(threshold, losses, run))
        best = conformal.choose(losses, alpha)
        if best != len(losses) - 1:
            break
    if best is None:
        point = curve[0]
        raise UserError(
            f"calibrate: no threshold keeps {question.target} for {question.confidence:.0%} of "
            f"pictures: at the smallest, {point['threshold']:g}, {point['kept']:g} of "
            f"{point['images']:g} do, and of others up to {point['bound']:.1%} may not; ask for "
            "less, take more --images, or give smaller ones with --threshold"
        )
    threshold = curve[best]["threshold"]
    full, run = make([None, threshold], chosen, question.seed + question.images)
    settings = recorded(question.method)
    scheduler = make_scheduler(question.solver, question.grid, pipe.scheduler)
    return Calibration(
        method=type(question.method).__name__,
        settings={k: v for k, v in settings.items() if k != "threshold"},
        threshold=threshold,
        target=str(question.target),
        confidence=question.confidence,
        model=question.model,
        model_hash=model_hash(pipe),
        dtype=model_dtype(pipe),
        scheduler=scheduler_record(scheduler),
        steps=question.steps,
        guidance=question.guidance,
        curve=curve,
        fresh=_verdict(question, run, full),
        seed=question.seed,
    )


def draw(prompts: Sequence[str], images: int, seed: int) -> list[str]:
    """The prompt of each of ``images`` pictures: in random order, all before any comes again."""
    known = list(dict.fromkeys(prompts))
    random.Random(seed).shuffle(known)
    return [known[i % len(known)] for i in range(images)]


def _maker(
    pipe: Any, question: Question, on_step: Callable[[str], None] | None
) -> Callable[[list[float | None], list[str], int], list[Run]]:
    """What makes the pictures of some prompts, by thresholds; None is the full run."""

    def make(thresholds: list[float | None], prompts: list[str], seed: int) -> list[Run]:
        jobs = [
            Job(
                label="full" if threshold is None else f"threshold {threshold:g}",
                method=None if threshold is None else replace(question.method, threshold=threshold),
                solver=question.solver,
                grid=question.grid,
                steps=question.steps,
            )
            for threshold in thresholds
        ]
        return run_jobs(
            pipe, jobs, prompts, guidance=question.guidance, seed=seed, batch=question.batch,
            on_step=on_step,
        )  # fmt: skip

    return make


def _point(threshold: float, losses: list[list[bool]], run: Run) -> dict[str, float]:
    """What the largest threshold so far has given."""
    return {
        "threshold": threshold,
        "kept": len(losses[-1]) - sum(losses[-1]),
        "images": len(losses[-1]),
        "bound": float(conformal.bound(losses)[-1]),
        "nfe": sum(run.nfe) / len(run.nfe),
        **_layers(run),
    }


def _layers(run: Run) -> dict[str, float]:
    """Blocks a step of a picture, where rows leave early."""
    return {"layers": sum(run.layers) / len(run.layers)} if run.layers else {}


def _verdict(question: Question, run: Run, full: Run) -> dict[str, float]:
    """How the threshold does where it was not chosen."""
    lost = question.target.lost(run, full)
    kept = len(lost) - sum(lost)
    return {
        "kept": kept,
        "images": len(lost),
        "rate": kept / len(lost),
        "chance": conformal.chance(kept, len(lost), question.confidence),
        "nfe": sum(run.nfe) / len(run.nfe),
        "nfe_full": sum(full.nfe) / len(full.nfe),
        **_layers(run),
    }
