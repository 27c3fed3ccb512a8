"""A small learned predictor of the error that skipping the next step would make.

    v = exp(f(s)),    f(s) = w_2 . tanh(W_1 z + b_1) + b_2,    z = (s - centre) / spread

The signals s are ratios that are known without a model call (`Signals`), so that neither the size
of the latents nor that of the output enters.  f was fitted to ln of

    mean |B (u* - u)| / mean |x'|

where u is the model's output at the next step, u* what the reuse rule puts in its place, B the
solver's coefficient of it and x' the latents after that step: the relative error that the skip
puts into the latents.  ``sidestep train adaptive`` records trajectories and fits f.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidestep.runtime.methods.criteria.gate import Gate, Gated, row_mean
from sidestep.runtime.methods.criteria.outputs import ComputedOutputs, per_row
from sidestep.runtime.methods.criterion import Course, Observation
from sidestep.runtime.methods.reuse import HISTORY, coordinates, reuse_weights
from sidestep.runtime.upload import upload

BUNDLED = Path(__file__).with_name("learned.safetensors")
FORMAT = "sidestep-adaptive-predictor-1"
SIGNALS = (
    "ln xi / delta",  # the scalar third difference
    "ln third / delta",  # the element-wise one
    "ln growth",  # of the step size
    "ln stride",  # step size to latents
    "ln error",  # of the reuse rule at the last computed step, relative to the output
    "ln change",  # of the output between the last two computed steps, relative and per step
    "ln reach",  # distance extrapolated over, in distances between the last two computed steps
    "ln skipped",  # 1 + steps skipped since the last computed one
    "lambda",  # at the step to decide
    "ln spacing",  # of lambda there
)
TENSORS = ("centre", "spread", "hidden", "outer")
_LEAST = 1e-6  # added under the logarithms
_WIDEST = 4.0  # standard deviations: beyond them a signal says no more than at them


class Signals:
    """Forms the signals of one trajectory's rows; keeps what it needs of the steps before."""

    def __init__(self, course: Course, reuse: str) -> None:
        """A trajectory begins.

        Args:
            course: Its rows and, where known, their lambda.
            reuse: The rule whose error is foretold.
        """
        self.course = course
        self.reuse = reuse
        self._steps: list[Tensor] = []  # d = x_{k+1} - x_k, [rows, ...] fp32, oldest first
        self._kept = ComputedOutputs(course.rows, HISTORY[reuse])
        self._error = self._change = torch.empty(0)  # [rows] fp32 each

    def put(self, seen: Observation) -> Tensor | None:  # [rows, len(SIGNALS)] fp32
        """Takes in a step; NaN where a signal is not known, None before the third step."""
        assert seen.output is not None
        self._take(seen.output.float(), seen)
        step = seen.x_next.float() - seen.x.float()
        kept, self._steps = self._steps, [*self._steps[-1:], step]
        if len(kept) < 2:
            return None
        before, previous = kept
        sizes = [row_mean(d) for d in (before, previous, step)]
        ratios = [
            ((sizes[2] + sizes[0]) / 2 - sizes[1]).abs() / sizes[1],
            row_mean((step + before) / 2 - previous) / sizes[1],
            sizes[2] / sizes[1],
            sizes[2] / row_mean(seen.x_next.float()),
            self._error,
            self._change,
        ]
        places = [self._place(steps, seen.step + 1) for steps in self._kept.steps]  # [rows, 4]
        return torch.cat(
            [(torch.stack(ratios, 1) + _LEAST).log(), upload(places, torch.float32, step.device)], 1
        )

    def _take(self, output: Tensor, seen: Observation) -> None:
        """Compares fresh outputs with what the rule would have given, and keeps them."""
        if not self._kept.outputs:
            self._error = self._change = torch.full_like(output.flatten(1)[:, 0], torch.nan)
        elif any(seen.computed):
            fresh = per_row(seen.computed, output)
            size = row_mean(output)
            error = row_mean(output - self.foretell(seen.step)) / size
            change = row_mean(output - self._kept.outputs[0]) / size
            change = change / per_row(self._kept.gaps(seen.step), output)
            self._error = torch.where(fresh, error, self._error)
            self._change = torch.where(fresh, change, self._change)
        if any(seen.computed):
            self._kept.put(output, seen)

    def foretell(self, wanted: int) -> Tensor:  # [rows, ...] fp32
        """What the rule puts in the place of the output at step ``wanted``."""
        snr = self.course.log_snr
        return self._kept.combine(
            [reuse_weights(self.reuse, steps, wanted, snr) for steps in self._kept.steps]
        )

    def _place(self, steps: Sequence[int], wanted: int) -> list[float]:
        """The signals that depend on where a row's computed steps lie, the last four."""
        log_snr = self.course.log_snr
        nodes, at = coordinates(steps[:2], wanted, log_snr)
        reach = (at - nodes[0]) / (nodes[0] - nodes[1]) if len(nodes) == 2 else 1.0
        here, spacing = math.nan, math.nan
        if log_snr is not None and wanted < len(log_snr) and math.isfinite(log_snr[wanted]):
            here, spacing = log_snr[wanted], abs(log_snr[wanted] - log_snr[wanted - 1])
        skipped = wanted - steps[0]
        return [math.log(abs(reach) + _LEAST), math.log(skipped), here, math.log(spacing + _LEAST)]


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
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Adaptive: cannot read the predictor {file}: {error}") from error
    units = tensors["outer"].numel() - 1 if "outer" in tensors else 0
    count = len(SIGNALS)
    shapes = [(count,), (count,), (count + 1, units), (units + 1,)]
    found = [tuple(tensors[name].shape) for name in TENSORS if name in tensors]
    if metadata.get("format") != FORMAT or found != shapes:
        raise ValueError(f"Adaptive: {file} is no predictor of this version ({FORMAT})")
    return Predictor(reuse=metadata["reuse"], **tensors)


class Learned(Gated):
    """v as above. Keeps two differences of the latents and the outputs that the rule combines."""

    DEFAULTS = Gate(threshold=0.02)
    reads_output = True

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
                f"{gate.reuse!r}; `sidestep train adaptive --reuse` makes another"
            )

    def begin(self) -> None:
        """Forgets the steps before."""
        self._signals = Signals(self.course, self.gate.reuse)

    def measure(self, seen: Observation) -> Tensor | None:
        """v of every row; None before the third step."""
        signals = self._signals.put(seen)
        if signals is None:
            return None
        if self._predictor.centre.device != signals.device:
            self._predictor = self._predictor.to(signals.device)
        return self._predictor(signals).exp()
