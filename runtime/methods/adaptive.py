"""AdaptiveDiffusion: skip the model where a criterion says that the picture does not need it.

Ye et al., "Training-Free Adaptive Diffusion with Bounded Difference Approximation Strategy",
NeurIPS 2024 (arXiv 2410.09873), and criteria beyond it (`sidestep.runtime.methods.criteria`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from sidestep.runtime.calibration import take_calibration
from sidestep.runtime.methods.criteria import CRITERIA
from sidestep.runtime.methods.criteria.gate import Gate
from sidestep.runtime.methods.criterion import Criterion

DEFAULT_MODE = "learned"


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Settings of AdaptiveDiffusion. What is left out takes the mode's own value.

    Published presets of mode ``"paper"``: 0.01 and 4 (Stable Diffusion, SDXL, I2VGen-XL,
    ModelScope), 0.004 and 6 (latent diffusion), 0.008 and 4 (I2VGen-XL at 50 steps).

    Attributes:
        mode: The criterion: a name in `CRITERIA`, ``"learned"`` if left out. ``"paper"`` is the
            published program exactly, row by row; of the settings below it has only the threshold
            and the cap.
        threshold: Largest value of the criterion at which a step is skipped; at 0 none is
            (in mode ``"paper"`` one whose value is 0). The default mode's own makes about 20 calls
            of 50 DDIM steps of the bundled model (docs/results/adaptive.md).
        max_skip: Most skips in a row. In mode ``"paper"`` the first run may be 5 long.
        reuse: What a skipped step goes on with, of the outputs computed before it: ``"hold"``,
            ``"linear"``, ``"quadratic"``, ``"interleave"`` or ``"damped"``
            (`sidestep.runtime.methods.reuse`). ``"damped"`` looks at the outputs: where the host
            hides them, every step is computed. Mode ``"learned"`` takes the rule of its predictor
            only; for another one there is ``"error-control"``.
        warm_up: First steps, always computed.
        protect_last: Last steps, always computed where the host says how many there are.
        debt: Whether the criterion's values add up over a run of skips.
        gradual: Whether a run of skips is at most one step longer than the run before it, or one
            for every hundred steps that are planned.
        predictor: In mode ``"learned"``, the file of its weights, from ``sidestep train adaptive``;
            None for the one that ships.
        target: What a picture has to keep, such as ``"psnr>=35"``: refused unless the calibration
            promises it. None takes what it promises.
        calibration: A file of ``sidestep calibrate``, which chose the threshold for a promise;
            what else is left out takes the file's value. `enable` refuses another model or
            scheduler than the file's, and warns of other steps or guidance.

    Raises:
        ValueError: A setting is out of range or another one than the calibration's, or the mode is
            unknown or has no such setting.
    """

    mode: str | None = None
    threshold: float | None = None
    max_skip: int | None = None
    reuse: str | None = None
    warm_up: int | None = None
    protect_last: int | None = None
    debt: bool | None = None
    gradual: bool | None = None
    predictor: str | None = None
    target: str | None = None
    calibration: str | Path | None = None

    def __post_init__(self) -> None:
        take_calibration(self)
        mode = DEFAULT_MODE if self.mode is None else self.mode
        if mode not in CRITERIA:
            known = ", ".join(map(repr, CRITERIA))
            raise ValueError(f"Adaptive: mode is {mode!r}, expected one of: {known}")
        if self.predictor is not None and mode != "learned":
            raise ValueError(
                f"Adaptive: predictor is {self.predictor!r}, expected None in mode {mode!r}; "
                "only mode 'learned' has one"
            )
        object.__setattr__(self, "mode", mode)
        for field in fields(Gate):
            if getattr(self, field.name) is None:
                own = getattr(CRITERIA[mode].DEFAULTS, field.name)
                object.__setattr__(self, field.name, own)
        self.criterion()  # refuses now what the mode cannot do

    def criterion(self) -> Criterion:
        """A fresh decision state."""
        assert self.mode is not None
        gate = Gate(**{field.name: getattr(self, field.name) for field in fields(Gate)})
        return CRITERIA[self.mode](gate)
