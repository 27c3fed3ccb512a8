"""The trajectories that exits are trained on, run after run of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from sidestep.adapters.calling import own_size
from sidestep.errors import UserError
from sidestep.runtime.methods.criterion import Course
from sidestep.training.exits_record import Call, Choose, Recorder, Translate


class Trajectory(Protocol):
    """The settings that are read here."""

    @property
    def prompts(self) -> Sequence[Any]: ...
    @property
    def steps(self) -> int: ...
    @property
    def guidance(self) -> float: ...
    @property
    def batch(self) -> int: ...
    @property
    def exits(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Trajectories:
    """Runs a pipeline under watch, each time with the next prompts and seeds.

    Attributes:
        recorder: What watches; to be entered before `run`.
        taken: Pictures so far.
    """

    def __init__(
        self, pipe: Any, settings: Trajectory, translate: Translate, ran: Callable[[], None]
    ) -> None:
        """Prepares.

        Args:
            pipe: With a transformer of the allow-list.
            settings: Of the run.
            translate: What the head reads of hidden states at an exit.
            ran: Called after each run.

        Raises:
            UserError: Rows cannot leave the model, or there is no block to leave it after.
        """
        if getattr(pipe, "transformer", None) is None:
            raise UserError(f"training: {type(pipe).__name__} has no transformer to train exits of")
        self.pipe, self.settings = pipe, settings
        self.recorder = Recorder(pipe, ())
        self.recorder.after = exit_places(len(self.recorder.blocks), settings.exits)
        if not self.recorder.after:
            raise UserError("training: the model has one block only, there is no place for an exit")
        self.taken = 0
        self._translate, self._ran = translate, ran
        self._order = np.random.default_rng(settings.seed).permutation(len(settings.prompts))
        self._generator = torch.Generator().manual_seed(settings.seed + 1)

    @property
    def exits(self) -> int:
        """K."""
        return len(self.recorder.after)

    @property
    def course(self) -> Course:
        """Of the last run.

        Raises:
            UserError: Plans cannot be made for such a course.
        """
        course = self.recorder.course
        if not course.advances or course.steps != self.settings.steps:
            raise UserError(
                f"training: {type(self.pipe.scheduler).__name__} does not say how log-SNR rises "
                "over its steps, expected a solver with one model call a step"
            )
        return course

    def run(self, batch: int, choose: Choose | None = None, same: bool = False) -> list[Call]:
        """Pictures of the next prompts.

        Args:
            batch: How many.
            choose: The exits that they go on with; None for the whole model.
            same: Whether all of them are of one prompt and one seed.
        """
        s = self.settings
        numbers = [self.taken] * batch if same else range(self.taken, self.taken + batch)
        self.taken += 1 if same else batch
        said = [s.prompts[self._order[n % len(self._order)]] for n in numbers]
        prompted = "prompt" in inspect.signature(type(self.pipe).__call__).parameters
        arguments: dict[str, Any] = {
            ("prompt" if prompted else "class_labels"): said,
            "num_inference_steps": s.steps,
            "guidance_scale": s.guidance,
            "generator": [torch.Generator().manual_seed(s.seed + n) for n in numbers],
            "output_type": "latent" if prompted else "np",
            **own_size(self.pipe),
        }
        none: list[int | None] = [None] * batch
        calls = self.recorder.run(arguments, batch, choose or (lambda _: none), self._translate)
        self._ran()
        return calls

    def run_whole(self, batch: int) -> list[Call]:
        """The same by the whole model, with the states after its last block as well, unrounded."""
        recorder = self.recorder
        after, dtype = recorder.after, recorder.dtype
        recorder.after, recorder.dtype = (*after, len(recorder.blocks)), None
        try:
            return self.run(batch)
        finally:
            recorder.after, recorder.dtype = after, dtype

    def at_random(self, _step: int) -> list[int | None]:
        """An exit at random for each row of a batch, the whole model among them."""
        drawn = torch.randint(self.exits + 1, (self.settings.batch,), generator=self._generator)
        return [None if exit == self.exits else exit for exit in drawn.tolist()]


def exit_places(blocks: int, exits: int) -> tuple[int, ...]:
    """Blocks passed at each exit: evenly spaced, rounded up, as many as there are places for."""
    places = {-(-blocks * i // (exits + 1)) for i in range(1, exits + 1)}
    return tuple(sorted(place for place in places if 0 < place < blocks))
