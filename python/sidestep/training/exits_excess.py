"""Trains exits of a frozen transformer from its own trajectories; no data are needed.

What is learned (`sidestep.runtime.exits.modules`): translators that take hidden states to the
model's own head, and a small network that says how wrong an exit would be for a row. The losses are
L_head and L_uem of `exits_losses`, on the excess error e_i of the guided output against that of the
whole model, which is 0 where depth does not matter.

Half of the trajectories are the model's own. The other half is recorded once the translators have
been trained for half of the iterations, and goes on from exits at random, so that the states which
exits lead to are seen as well. Then `exits_measure` measures what plans are made from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sidestep.errors import UserError
from sidestep.runtime.exits.file import Exits, save_exits
from sidestep.runtime.identity import model_hash, sample_weights
from sidestep.training.average import Average
from sidestep.training.exits_fit import Fit, Learned
from sidestep.training.exits_measure import RUNS, Figures, measure, sensitivity_runs
from sidestep.training.exits_record import Call
from sidestep.training.exits_stale import FIRST
from sidestep.training.exits_trajectories import Trajectories
from sidestep.training.optimise import Progress, check_settings, optimise, seed_all

EMA = 0.99


@dataclass(frozen=True, kw_only=True)
class ExcessTraining:
    """Settings of one run.

    Attributes:
        out: The file to write.
        prompts: What pictures are made of; ``class_labels`` where the pipeline takes those.
        steps: Of every trajectory.
        guidance: Guidance scale.
        trajectories: How many are trained on.
        batch: Trajectories a model call.
        exits: At most so many, evenly spaced; a model of L blocks has L - 1 places for them.
        probes: Of each exit.
        units: Hidden units of the network of each exit.
        iterations: Of the fit.
        lr: Its peak learning rate.
        sensitivity: Pictures that S is measured on.
        seed: Of the noise, the exits at random and the fit.
        threads: CPU threads; 0 leaves torch's own setting.
    """

    out: str | Path
    prompts: Sequence[Any]
    steps: int = 20
    guidance: float = 7.5
    trajectories: int = 64
    batch: int = 16
    exits: int = 3
    probes: int = 8
    units: int = 32
    iterations: int = 1500
    lr: float = 1e-3
    sensitivity: int = 4
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self,
            positive=("steps", "trajectories", "batch", "exits", "probes", "units", "lr"),
            at_least_zero=("seed", "threads"),
        )
        if self.sensitivity < 1:
            raise UserError(f"training: sensitivity is {self.sensitivity}, expected 1 or more")
        if self.steps <= FIRST:
            raise UserError(f"training: steps is {self.steps}, expected {FIRST + 1} or more")
        if not self.prompts:
            raise UserError("training: no prompt was given")
        if not Path(self.out).parent.is_dir() or Path(self.out).is_dir():
            raise UserError(f"--out: cannot write {self.out}, expected a file in a folder that is")

    @property
    def minutes(self) -> None:
        """The fit's length is given in iterations."""


@dataclass(frozen=True, kw_only=True)
class ExcessResult:
    """What a run did: `losses` has one value an iteration of the fit."""

    out: Path
    seconds: float
    losses: list[float]
    figures: Figures


def train_excess(
    pipe: Any,
    settings: ExcessTraining,
    ran: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
) -> ExcessResult:
    """Records, fits, measures and saves.

    Args:
        pipe: A pipeline with a transformer of the allow-list; it is left as it was.
        settings: See `ExcessTraining`.
        ran: Called after each run of the pipeline, `pipeline_runs` times in all.
        progress: Called after each iteration of the fit, as `optimise` says.

    Raises:
        UserError: The pipeline cannot be used; the message says why.
    """
    start = time.monotonic()
    seed_all(settings.seed, settings.threads)
    trainer = _Trainer(pipe, settings, ran)
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with trainer.trajectories.recorder:
            average, losses = trainer.fit(start, progress)
            with average.swapped_in():
                figures = trainer.save()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    seconds = time.monotonic() - start
    return ExcessResult(out=Path(settings.out), seconds=seconds, losses=losses, figures=figures)


def pipeline_runs(settings: ExcessTraining) -> int:
    """How often the pipeline is run."""
    sensitivity = sensitivity_runs(settings.steps, settings.batch)
    return 2 * _batches(settings) + RUNS + settings.sensitivity * sensitivity


def _batches(settings: ExcessTraining) -> int:
    """Runs in each of the two rounds."""
    return max(1, round(settings.trajectories / settings.batch / 2))


class _Trainer:
    """One run of the training."""

    def __init__(self, pipe: Any, settings: ExcessTraining, ran: Callable[[], None]) -> None:
        self.settings = settings
        self.trajectories = Trajectories(pipe, settings, self._translate, ran)
        self._learned: Learned | None = None
        self._fit: Fit | None = None

    def _translate(self, exit: int, hidden: Tensor) -> Tensor:
        assert self._learned is not None
        return self._learned.translators(exit, hidden.float()).to(hidden.dtype)

    def fit(self, start: float, progress: Progress | None) -> tuple[Average, list[float]]:
        """Both rounds: the average of what is learned, and the losses."""
        s, trajectories = self.settings, self.trajectories
        calls: list[Call] = []
        for _ in range(_batches(s)):
            calls += trajectories.run(s.batch)
        model = trajectories.pipe.transformer
        width = calls[0].hidden[0].shape[2]
        learned = self._learned = Learned.fresh(
            trajectories.exits, width, s.probes, s.units, s.seed, model.device
        )
        fit = self._fit = Fit(trajectories.recorder, learned, trajectories.course, s.seed)
        average, losses = Average(learned.parameters, EMA), list[float]()

        def iterate(until: int) -> None:
            steps = optimise(s, start, average, lambda: fit.loss(calls), losses, progress)
            while len(losses) < until:
                next(steps)

        iterate(s.iterations // 2)
        with average.swapped_in():
            for _ in range(_batches(s)):
                calls += trajectories.run(s.batch, trajectories.at_random)
        iterate(s.iterations)
        return average, losses

    def save(self) -> Figures:
        """Measures, and writes the file."""
        s, trajectories, learned, fit = self.settings, self.trajectories, self._learned, self._fit
        assert learned is not None and fit is not None
        measured, figures = measure(trajectories, fit, s.sensitivity)
        model = trajectories.pipe.transformer
        exits = Exits(
            kind="excess",
            model=type(model).__name__,
            model_hash=model_hash(model),
            model_weights=sample_weights(model),
            blocks=len(trajectories.recorder.blocks),
            after=tuple(trajectories.recorder.after),
            probes=learned.probes,
            translators=learned.translators,
            uncertainty=learned.uncertainty,
            measured=measured,
            trained={
                "scheduler": type(trajectories.pipe.scheduler).__name__, "steps": s.steps,
                "multistep": trajectories.course.multistep,
                "guidance": s.guidance, "trajectories": s.trajectories,
                "iterations": s.iterations, "seed": s.seed,
            },
        )  # fmt: skip
        save_exits(exits, Path(s.out))
        return figures


def prompts_of(pipe: Any, model: str, count: int, seed: int) -> list[Any]:
    """What a model was trained to draw: its classes, or the captions in its folder.

    Raises:
        UserError: Neither is known.
    """
    from sidestep.models import BUNDLED
    from sidestep.training.adaptive_predictor import training_prompts

    classes = getattr(getattr(pipe, "transformer", None), "config", {}).get("num_embeds_ada_norm")
    if type(pipe).__name__ == "DiTPipeline" and classes:
        return list(range(classes))
    folder = BUNDLED.get(model, Path(model))
    if not (folder / "captions.txt").is_file():
        raise UserError(f"{model}: it has no captions.txt; give --prompts FILE, one prompt a line")
    return list(training_prompts(folder, count, seed))
