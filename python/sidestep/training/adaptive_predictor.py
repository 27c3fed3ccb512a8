"""Trains the learned criterion of `Adaptive`: what would skipping the next step do?

Trajectories of the bundled model are recorded while a policy skips steps, half of them at random
and half as mode "error-control" does, so that the signals are also seen inside runs of skips. The
model is called at every step all the same: beside each skipped or computed output u stands what the
reuse rule would put in its place, u*, and

    f(s) = ln (rms(u* - u) / rms(u_b))        u_b: the newest computed output

(`sidestep.runtime.methods.criteria.learned`) is fitted to the signals s of the step before, by
least squares. The prompts are captions that the model was trained on and compositions of them;
whatever would give away a prompt of the test set, `compositions.txt`, is left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sidestep.adapters.denoiser import GuidedDenoiser
from sidestep.errors import UserError
from sidestep.runtime.files import write_whole
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criteria.gate import Gate, Gated
from sidestep.runtime.methods.criteria.learned import FORMAT, SIGNALS, TENSORS, Predictor, Signals
from sidestep.runtime.methods.criteria.reused import Reused, rms
from sidestep.runtime.methods.criterion import Course, Criterion, Observation
from sidestep.runtime.methods.reuse import HISTORY
from sidestep.runtime.plan import Plan
from sidestep.runtime.plan_course import plan_course
from sidestep.training.average import Average
from sidestep.training.emoji_data import PALETTE, HeldOut
from sidestep.training.emoji_folder import read_lines
from sidestep.training.optimise import Progress, check_settings, optimise

RUNS = (
    ("DDIMScheduler", 25),
    ("EulerDiscreteScheduler", 25),
    ("DPMSolverMultistepScheduler", 25),
    ("DDIMScheduler", 50),
    ("EulerDiscreteScheduler", 50),
    ("DPMSolverMultistepScheduler", 50),
    ("DDIMScheduler", 150),
)
"""Schedulers of diffusers and their steps: a batch each, in turn."""
GUIDANCE = (3.0, 8.0)
WARM_UP = 3  # steps computed first
THRESHOLDS = (0.003, 0.03)  # of mode "error-control", evenly in logarithm
BATCH = 1024  # samples an iteration

CHECKED = 8  # every eighth row of a batch is left out of the fit, and checks it


@dataclass(frozen=True, kw_only=True)
class PredictorTraining:
    """Settings of one run.

    Attributes:
        out: The file to write.
        reuse: The rule whose error is learned.
        trajectories: How many are recorded, the entries of `RUNS` in turn.
        batch: Trajectories a model call.
        units: Hidden units; f has 15 a unit and one more.
        iterations: Of the fit.
        lr: Its peak learning rate.
        seed: Of the prompts, the noise, the skips and the fit.
        threads: CPU threads; 0 leaves torch's own setting.
    """

    out: str | Path
    reuse: str = "damped"
    trajectories: int = 224
    batch: int = 16
    units: int = 16
    iterations: int = 3000
    lr: float = 1e-2
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        check_settings(
            self,
            positive=("trajectories", "batch", "units", "lr"),
            at_least_zero=("seed", "threads"),
        )
        if self.reuse not in HISTORY:
            raise UserError(f"--reuse: got {self.reuse!r}, expected one of {', '.join(HISTORY)}")
        if not Path(self.out).parent.is_dir() or Path(self.out).is_dir():
            raise UserError(f"--out: cannot write {self.out}, expected a file in a folder that is")

    @property
    def minutes(self) -> None:
        """The fit's length is given in iterations."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What was recorded.

    Attributes:
        signals: ``[N, signals]`` fp32, NaN where one is not known.
        errors: ``[N]`` fp32, the logarithms that f is fitted to.
        checks: ``[N]`` bool, whether the sample is left out of the fit.
    """

    signals: Tensor
    errors: Tensor
    checks: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """All of them, one after another."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True, kw_only=True)
class PredictorResult:
    """What a run did.

    Attributes:
        out: The file.
        seconds: Length of the run.
        losses: One value an iteration of the fit.
        samples: Recorded in all.
        explained: Share of the errors' variance that f explains, on the samples left out.
    """

    out: Path
    seconds: float
    losses: list[float]
    samples: int
    explained: float


def train_predictor(
    settings: PredictorTraining,
    recorded: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> PredictorResult:
    """Records, fits and saves.

    Args:
        settings: See `PredictorTraining`.
        recorded: Called after each batch of trajectories.
        progress: Called after each iteration of the fit, as `optimise` says.

    Raises:
        UserError: The settings or the output file cannot be used.
    """
    from sidestep.models import load_pipeline

    start = time.monotonic()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    samples = record(load_pipeline("emoji-sd"), settings, recorded)
    losses: list[float] = []
    predictor = fit(samples, settings, losses, progress)
    save_predictor(predictor, Path(settings.out))
    return PredictorResult(
        out=Path(settings.out),
        seconds=time.monotonic() - start,
        losses=losses,
        samples=len(samples.errors),
        explained=explained(predictor, samples),
    )


def training_prompts(folder: Path, count: int, seed: int) -> list[str]:
    """Captions of the folder and compositions of them, half each, none of its test prompts."""
    captions = read_lines(folder / "captions.txt")
    held_out = HeldOut(read_lines(folder / "compositions.txt"))
    rng = np.random.default_rng(seed)
    prompts: list[str] = []
    while len(prompts) < count:
        first, second = rng.choice(captions, 2, replace=False)
        colour, joint = rng.choice(list(PALETTE)), rng.choice(["and", "on a", "with"])
        composed = (f"{colour} {first}", f"{first} {joint} {second}")[int(rng.integers(2))]
        prompt = composed if len(prompts) % 2 else str(first)
        if not held_out.gives_away(prompt):
            prompts.append(prompt)
    return prompts


def record(
    pipe: Any, settings: PredictorTraining, recorded: Callable[[], None] | None = None
) -> Samples:
    """Runs the trajectories, batch by batch, and gathers what they show."""
    from sidestep.adapters.catalogue import make_scheduler
    from sidestep.models import BUNDLED

    prompts = training_prompts(BUNDLED["emoji-sd"], settings.trajectories, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    parts: list[Samples] = []
    for number, first in enumerate(range(0, len(prompts), settings.batch)):
        texts = prompts[first : first + settings.batch]
        solver, steps = RUNS[number % len(RUNS)]
        plan = Plan.from_scheduler(make_scheduler(solver, None, pipe.scheduler), steps)
        noise = torch.randn(len(texts), channels, side, side, generator=generator)
        share = torch.rand(len(texts), generator=generator)
        weight = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * share
        policy = Policy(plan_course(plan, rows=len(texts)), settings.reuse, generator)
        model = GuidedDenoiser(pipe, list(texts), weight[:, None, None, None])
        x = noise * plan.initial_scale
        parts.append(record_run(model, plan, x, policy, settings.reuse))
        if recorded is not None:
            recorded()
    return Samples.joined(parts)


class AtRandom(Gated):
    """Skips with a likelihood: the threshold of a number between 0 and 1."""

    DEFAULTS = Gate(
        threshold=0.5, max_skip=40, warm_up=WARM_UP, protect_last=0, debt=False, gradual=True
    )

    def __init__(self, likely: float, generator: torch.Generator) -> None:
        """Takes the likelihood, and where the numbers come from."""
        super().__init__(replace(self.DEFAULTS, threshold=likely))
        self._generator = generator

    def begin(self) -> None:
        """Keeps nothing."""

    def measure(self, seen: Observation) -> Tensor:
        """A number for each row."""
        return torch.rand(len(seen.x), generator=self._generator)


class Policy:
    """Which rows compute the next step: half of them at random, half by their error.

    Every row has a likelihood, or a threshold of mode "error-control", of its own.
    """

    def __init__(self, course: Course, reuse: str, generator: torch.Generator) -> None:
        """Draws the likelihoods and the thresholds."""
        self._rows: list[Criterion] = []
        for row, share in enumerate(torch.rand(course.rows, generator=generator).tolist()):
            low, high = THRESHOLDS
            threshold = low * (high / low) ** share
            settings = Adaptive(mode="error-control", threshold=threshold, reuse=reuse)
            self._rows.append(settings.criterion() if row % 2 else AtRandom(share, generator))
            self._rows[-1].start(replace(course, rows=1))

    def __call__(self, seen: Observation) -> list[bool]:  # [rows]
        """Sees that a step is done and decides the one after it."""
        compute: list[bool] = []
        for i, criterion in enumerate(self._rows):
            row = slice(i, i + 1)
            one = replace(
                seen,
                x=seen.x[row],
                x_next=seen.x_next[row],
                output=None if seen.output is None else seen.output[row],
                computed=seen.computed[row],
            )
            compute += criterion.observe(one).compute
        return compute


def record_run(
    model: Callable[[Tensor, float], Tensor],
    plan: Plan,
    x: Tensor,  # [rows, ...]
    policy: Callable[[Observation], Sequence[bool]],
    reuse: str,
) -> Samples:
    """One batch of trajectories under the policy, with the error of a skip at every step."""
    reused = Reused(plan_course(plan, rows=len(x)), reuse)
    signals = Signals(reused)
    latents, outputs = [x], [x]  # of the step that runs
    computed: list[Sequence[bool]] = [[True] * len(x)]  # step by step
    known: list[Tensor | None] = []  # the signals of each step but the first, formed before it
    errors: list[Tensor] = []

    def call(scaled: Tensor, t: float) -> Tensor:
        output = model(scaled, t)
        k = len(known)
        if k:
            foretold = reused.foretell(k)
            errors.append((rms(foretold - output) / reused.size + 1e-8).log().float())
            fresh = torch.tensor(computed[k]).view(-1, *[1] * (x.ndim - 1))
            output = torch.where(fresh, output, foretold)
        outputs[:] = [output]
        return output

    def stepped(k: int, x_next: Tensor) -> None:
        seen = Observation(
            step=k, x=latents[0], x_next=x_next, output=outputs[0], computed=computed[k]
        )
        reused.put(seen)
        known.append(signals.put(seen))
        computed.append(policy(seen))
        latents[0] = x_next

    plan.run(model=call, x=x, callback=stepped)
    pairs = [(s, e) for s, e in zip(known, errors, strict=False) if s is not None]
    return Samples(
        signals=torch.cat([s for s, _ in pairs]),
        errors=torch.cat([e for _, e in pairs]),
        checks=(torch.arange(len(x)) % CHECKED == CHECKED - 1).repeat(len(pairs)),
    )


def fit(
    samples: Samples,
    settings: PredictorTraining,
    losses: list[float],
    progress: Progress | None = None,
) -> Predictor:
    """Least squares by AdamW, from random weights."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    signals, errors = samples.signals[~samples.checks], samples.errors[~samples.checks]
    known = signals.isfinite()
    centre = signals.nan_to_num(nan=0.0).sum(0) / known.sum(0).clamp(min=1)
    spread = (signals - centre).nan_to_num(nan=0.0).square().sum(0) / known.sum(0).clamp(min=1)
    hidden = torch.randn(len(SIGNALS) + 1, settings.units, generator=generator)
    hidden = nn.Parameter(hidden / len(SIGNALS) ** 0.5)
    outer = nn.Parameter(torch.zeros(settings.units + 1))
    outer.data[-1] = errors.mean()
    predictor = Predictor(
        reuse=settings.reuse, centre=centre, spread=spread.sqrt().clamp(min=1e-3), hidden=hidden,
        outer=outer,
    )  # fmt: skip
    average = Average([hidden, outer], 0.99)

    def loss() -> Tensor:
        rows = torch.randint(len(errors), (BATCH,), generator=generator)
        return (predictor(signals[rows]) - errors[rows]).square().mean()

    for _ in optimise(settings, time.monotonic(), average, loss, losses, progress):
        pass
    with average.swapped_in():
        tensors = {name: getattr(predictor, name).detach().clone() for name in TENSORS}
    return Predictor(reuse=settings.reuse, **tensors)


def explained(predictor: Predictor, samples: Samples) -> float:
    """1 - residual / variance of the errors that the fit did not see; NaN where there are none."""
    errors = samples.errors[samples.checks]
    if not len(errors):
        return math.nan
    residual = predictor(samples.signals[samples.checks]) - errors
    return float(1 - residual.square().mean() / errors.var(correction=0))


def save_predictor(predictor: Predictor, path: Path) -> None:
    """Writes the file, whole or not at all."""
    tensors = {name: getattr(predictor, name).contiguous() for name in TENSORS}
    write_whole(path, to_bytes(tensors, {"format": FORMAT, "reuse": predictor.reuse}))
