"""A small learned predictor of the error that skipping the next step would make.

    v_k = 0.008 (E / 0.008)^p,    p = 1.4 where E > 0.008, else 0.3
    E = W_k C_k rms(u_b) exp(f(s))                                    C_k: `carried_error`

    f(s) = w_2 . tanh(W_1 z + b_1) + b_2,    z = (s - centre) / spread

E is the number of mode "error-control", with f in the place of its formula for the error of the
output.  The signals s are known without a model call and have no unit (`Signals`).  With the newest
computed output u_b, the model's output u at the next step and what the reuse rule puts in its
place, u*, f was fitted to

    ln (rms(u* - u) / rms(u_b))

In 220 recorded trajectories the error of the finished picture grew with the power 1.3 of the sum of
such errors (no command repeats that fit): rows that are harder to foretell are more sensitive as
well, hence the power of large errors.  Among small ones there is less to tell apart than f can, and
even runs of skips do best: hence their power.  W_k is 1.7 early on, where a picture can still
become another one, and 1 afterwards.  All were chosen by trial on the bundled model, on every
fourth prompt of `compositions.txt` from its third on.
``sidestep train adaptive`` records trajectories and fits f.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidestep.runtime.methods.criteria.carried_error import carried_error
from sidestep.runtime.methods.criteria.gate import Gate, Gated
from sidestep.runtime.methods.criteria.outputs import per_row, push
from sidestep.runtime.methods.criteria.reused import Reused, gaps
from sidestep.runtime.methods.criterion import Observation
from sidestep.runtime.upload import upload

BUNDLED = Path(__file__).with_name("learned.safetensors")
FORMAT = "sidestep-adaptive-predictor-2"
SIGNALS = (
    "ln error",  # of the reuse rule at the last computed step, relative to the output
    "ln change",  # of the output between the last two computed steps, relative and per step
    "share",  # of the rule's change that came true there
    "ln error before",  # the same three at the computed step before it
    "ln change before",
    "share before",
    "ln gap",  # steps between the last two computed steps
    "ln gap before",  # and between the two before
    "ln skipped",  # 1 + steps skipped since the last computed one
    "ln distance",  # of lambda from the last computed step to the one to decide
    "ln spacing",  # of lambda there
    "lambda",  # there
    "multistep",  # 1 where the solver itself extrapolates, else 0
)
TENSORS = ("centre", "spread", "hidden", "outer")
LARGE, POWERS = 0.008, (0.3, 1.4)
"""v grows with these powers of the error of a step, below such an error and above it."""

EARLY, EARLY_WEIGHT = -1.0, 1.7
"""Until this lambda an error weighs so much more."""

_LEAST = 1e-6  # added under the logarithms
_WIDEST = 4.0  # standard deviations: beyond them a signal says no more than at them


class Signals:
    """Forms the signals of one trajectory's rows from what `Reused` has measured."""

    def __init__(self, reused: Reused) -> None:
        """A trajectory begins.

        Args:
            reused: Of the same trajectory; takes in every step first.
        """
        self._reused = reused
        self._measured: list[Tensor] = []  # error, change and share, [rows, 3] fp32, newest first

    def put(self, seen: Observation) -> Tensor | None:  # [rows, len(SIGNALS)] fp32
        """Takes in a step; NaN where a signal is not known, None after the first step."""
        reused = self._reused
        if any(seen.computed):
            spans = per_row(gaps(reused.steps), reused.size)
            ratios = torch.stack([reused.missed, reused.moved / spans], 1) / reused.size[:, None]
            measured = torch.cat([(ratios + _LEAST).log(), reused.share[:, None]], 1)
            fresh = per_row(seen.computed, measured)
            self._measured = push(self._measured, measured, fresh)[:2]
        if len(self._measured) < 2:
            return None
        places = [self._place(steps, seen.step + 1) for steps in reused.steps]
        return torch.cat([*self._measured, upload(places, torch.float32, reused.size.device)], 1)

    def _place(self, steps: Sequence[int], wanted: int) -> list[float]:
        """The signals that depend on where a row's computed steps lie, the last seven."""
        course = self._reused.course
        gap, before = gaps([steps, steps[1:]])
        here, spacing, distance = math.nan, math.nan, math.nan
        if course.log_snr is not None and wanted < len(course.log_snr):
            here = course.log_snr[wanted]
            spacing = math.log(here - course.log_snr[wanted - 1] + _LEAST)
            distance = math.log(here - course.log_snr[steps[0]] + _LEAST)
        spans = [math.log(gap), math.log(before), math.log(wanted - steps[0])]
        places = [
            value if math.isfinite(value) else math.nan for value in (distance, spacing, here)
        ]
        return [*spans, *places, float(course.multistep)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """f and its standardisation.

    Attributes:
        reuse: The rule whose error it foretells.
        centre: ``[signals]`` mean of each signal in training.
        spread: ``[signals]`` standard deviation of each.
        hidden: ``[signals + 1, units]``, W_1 and, last, b_1.
        outer: ``[units + 1]``, w_2 and, last, b_2.
    """

    reuse: str
    centre: Tensor
    spread: Tensor
    hidden: Tensor
    outer: Tensor

    def __call__(
        self,
        signals: Tensor,  # [rows, signals] fp32
    ) -> Tensor:  # [rows]
        """The logarithm of the error. A signal that is not known is taken as usual.

        Sums rather than products of matrices: a row's result does not depend on how many there are.
        """
        z = ((signals - self.centre) / self.spread).nan_to_num(nan=0.0).clamp(-_WIDEST, _WIDEST)
        units = (z[:, :, None] * self.hidden[:-1]).sum(1) + self.hidden[-1]
        return (units.tanh() * self.outer[:-1]).sum(1) + self.outer[-1]

    def to(self, device: torch.device) -> Predictor:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        return Predictor(reuse=self.reuse, **moved)


def load_predictor(path: str | None) -> Predictor:
    """Reads a predictor; the bundled one if None.

    Raises:
        ValueError: There is no such file, or it is not a predictor.
    """
    file = BUNDLED if path is None else Path(path)
    try:
        written = file.stat()
        return _read(file.absolute(), (written.st_mtime_ns, written.st_size, written.st_ino))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Adaptive: cannot read the predictor {file}: {error}") from error


@functools.lru_cache(maxsize=16)
def predictor_on(device: torch.device, predictor: Predictor) -> Predictor:
    """The predictor on that device: copied there once, and not for every criterion."""
    return predictor if predictor.centre.device == device else predictor.to(device)


@functools.lru_cache(maxsize=16)
def _read(file: Path, written: tuple[int, ...]) -> Predictor:
    """Reads the file once for all criteria, and again when it was ``written`` anew."""
    with (
        torch.inference_mode(False),
        torch.device("cpu"),
        safe_open(file, framework="pt") as opened,
    ):
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    units = tensors["outer"].numel() - 1 if "outer" in tensors else 0
    count = len(SIGNALS)
    shapes = [(count,), (count,), (count + 1, units), (units + 1,)]
    found = [tuple(tensors[name].shape) for name in TENSORS if name in tensors]
    if metadata.get("format") != FORMAT or found != shapes:
        raise ValueError(f"Adaptive: {file} is no predictor of this version ({FORMAT})")
    return Predictor(reuse=metadata["reuse"], **tensors)


class Learned(Gated):
    """v as above. Keeps two measurements a row."""

    DEFAULTS = Gate(
        threshold=0.017, max_skip=40, warm_up=2, protect_last=2, reuse="damped", gradual=True
    )
    reads_reused = True

    def __init__(self, gate: Gate) -> None:
        """Reads the predictor.

        Raises:
            ValueError: It cannot be read, or was trained for another reuse rule.
        """
        super().__init__(gate)
        self._predictor = load_predictor(gate.predictor)
        if self._predictor.reuse != gate.reuse:
            raise ValueError(
                f"Adaptive: the predictor was trained for reuse={self._predictor.reuse!r}, got "
                f"{gate.reuse!r}; mode 'learned' takes its predictor's rule only. Mode "
                "'error-control' takes any, and `sidestep train adaptive --reuse` makes another "
                "predictor"
            )

    def begin(self) -> None:
        """Forgets the steps before."""
        self._carried = list(carried_error(self.course))
        for step, snr in enumerate(self.course.log_snr or ()):
            self._carried[step] *= EARLY_WEIGHT if snr < EARLY else 1
        self._signals = Signals(self.reused)

    def measure(self, seen: Observation) -> Tensor | None:
        """v of every row; None before its second computed output."""
        signals = self._signals.put(seen)
        if signals is None:
            return None
        carried = self._carried[min(seen.step + 1, len(self._carried) - 1)]
        predictor = predictor_on(signals.device, self._predictor)
        return sharpened((carried * self.reused.size).log() + predictor(signals))


def sharpened(
    log_error: Tensor,  # [rows] fp32, ln E
) -> Tensor:  # [rows]
    """v of E. In logarithms: torch rounds a power by its place in the batch."""
    above = log_error - math.log(LARGE)
    return LARGE * torch.where(above > 0, POWERS[1] * above, POWERS[0] * above).exp()
