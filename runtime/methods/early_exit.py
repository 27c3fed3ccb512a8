"""Early exit: rows leave the network where the rest of it would hardly change the picture.

AdaDiff (Tang et al., "AdaDiff: Accelerating Diffusion Models through Step-Wise Adaptive
Computation", ECCV 2024, arXiv 2309.17074), and exits of a frozen model that are trained on, and
decided by, what leaving does to the finished picture (`sidestep.runtime.exits.rules`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from sidestep.runtime.calibration import take_calibration
from sidestep.runtime.exits.budget import OneBudget
from sidestep.runtime.exits.file import Exits, load_exits
from sidestep.runtime.exits.layouts import Layout
from sidestep.runtime.exits.leaving import Leaving
from sidestep.runtime.exits.rules import RULES
from sidestep.runtime.exits.rules.sample import PerSample
from sidestep.runtime.exits.rules.static import LeftOut, Static
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criterion import Course, Criterion, Decision, Observation

FORETELLING = "error-control"
"""The mode of `Adaptive` whose number is the error of the finished picture."""


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """Settings of early exit.

    Attributes:
        exits: The file that ``sidestep train exits`` has written for the model.
        mode: ``"static"``: the same for all rows, planned for each step before the trajectory
            begins: the whole model, an exit of it, or no call; nothing is read from the device.
            ``"sample"``: each row by its own predicted error, within a budget of its own.
            ``"adadiff"``: the published rule, for a model that was trained for it. None is the
            first or the last, as the file is.
        threshold: What the rows may lose; larger is faster, at 0 nobody leaves. For ``"static"``
            and ``"sample"`` the RMS error of the finished latents; for ``"adadiff"`` the
            uncertainty below which a row leaves. None is the mode's own.
        batch_mean: ``"adadiff"`` only: one decision for the whole batch, by its mean uncertainty,
            as in the released code. Not so if left out.
        branches_apart: ``"adadiff"`` only: each guidance branch leaves on its own, as there. Not so
            if left out.
        reuse: Steps at which the model is not called at all. None is the mode's own: ``"static"``
            plans them, the others have none; False is none. With `Adaptive` each row decides. In
            mode ``"sample"`` that is paid from the same budget, and its own mode is the one that
            foretells an error, ``"error-control"``, with its ``debt``; in mode ``"static"`` exits
            have translators only then, as calls cannot be continued that were not made.
        target: What a picture has to keep, such as ``"psnr>=35"``: refused unless the calibration
            promises it. None takes what it promises.
        calibration: A file of ``sidestep calibrate``, which chose the threshold for a promise with
            these exits; what else is left out, `reuse` among it, takes the file's value.

    Raises:
        ValueError: A setting is out of range, another one than the calibration's, or does not go
            with the mode; or the file cannot be read or is for another mode.
    """

    exits: str | Path
    mode: str | None = None
    threshold: float | None = None
    batch_mean: bool | None = None
    branches_apart: bool | None = None
    reuse: Adaptive | bool | None = None
    target: str | None = None
    calibration: str | Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "exits", Path(self.exits))
        if not (self.reuse in (None, False) or isinstance(self.reuse, Adaptive)):
            raise ValueError(
                f"EarlyExit: reuse is {self.reuse!r}, expected Adaptive(...), False or None"
            )
        if isinstance(self.reuse, Adaptive) and self.reuse.calibration is not None:
            raise ValueError(
                "EarlyExit: reuse has a calibration, which promises nothing of early exits; "
                "calibrate both together"
            )
        take_calibration(self)
        if isinstance(self.reuse, dict):  # as the calibration has it
            object.__setattr__(self, "reuse", Adaptive(**self.reuse))
        kind = load_exits(self.exits).kind
        mode = self.mode or ("adadiff" if kind == "faithful" else "static")
        if mode not in RULES:
            known = ", ".join(map(repr, RULES))
            raise ValueError(f"EarlyExit: mode is {mode!r}, expected one of: {known}")
        if RULES[mode].KIND != kind:
            raise ValueError(
                f"EarlyExit: mode is {mode!r}, but {self.exits} was trained with --mode {kind}, "
                f"expected one trained with --mode {RULES[mode].KIND}"
            )
        if (self.batch_mean or self.branches_apart) and mode != "adadiff":
            raise ValueError(
                f"EarlyExit: batch_mean and branches_apart belong to mode 'adadiff', got {mode!r}"
            )
        reuse = self.reuse if mode == "sample" else None
        if isinstance(reuse, Adaptive) and (reuse.mode != FORETELLING or not reuse.debt):
            raise ValueError(
                f"EarlyExit: reuse has mode {reuse.mode!r} and debt={reuse.debt}, whose numbers "
                f"are no errors that a budget could pay for; expected mode {FORETELLING!r} with "
                "its debt"
            )
        threshold = RULES[mode].THRESHOLD if self.threshold is None else self.threshold
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"EarlyExit: threshold is {threshold}, expected 0 or more")
        object.__setattr__(self, "mode", mode)
        for switch in ("batch_mean", "branches_apart"):
            object.__setattr__(self, switch, bool(getattr(self, switch)))
        object.__setattr__(self, "threshold", float(threshold))

    def file(self) -> Exits:
        """What the file holds."""
        return load_exits(self.exits)

    def criterion(self, leaving: Leaving | None = None) -> Criterion:
        """A fresh decision state on whole model calls.

        Args:
            leaving: Of the same trajectories; what it has of a ledger pays for skipped steps too.
        """
        if not isinstance(self.reuse, Adaptive):
            rule = None if leaving is None or self.reuse is False else leaving.rule
            return LeftOut(rule) if isinstance(rule, Static) else Every()
        criterion = self.reuse.criterion()
        if leaving is None or not isinstance(leaving.rule, PerSample):
            return criterion
        return OneBudget(criterion, leaving.rule)

    def leaving(self, exits: Exits, layout: Layout) -> Leaving:
        """A fresh state of the exits within model calls."""
        assert self.mode is not None and self.threshold is not None
        rule = RULES[self.mode](
            exits,
            self.threshold,
            batch_mean=bool(self.batch_mean),
            branches_apart=bool(self.branches_apart),
            reuse=self.reuse,
        )
        return Leaving(exits, layout, rule)


class Every:
    """Computes every row at every step."""

    history = 1

    def start(self, course: Course) -> None:
        """Takes the number of rows."""
        self._rows = course.rows

    def observe(self, seen: Observation) -> Decision:
        """All of them."""
        return Decision(compute=[True] * self._rows, reasons=["every"] * self._rows)
