"""What the trainings from pipeline folder to pipeline folder share: settings, examples, card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sidestep.errors import UserError
from sidestep.training.emoji_data import PACKAGE, VERSION, Example, HeldOut, load_emoji
from sidestep.training.emoji_folder import read_lines
from sidestep.training.emoji_mix import Mix, build_examples

SHARES = {"focus": 0.35, "plain": 0.15, "moved": 0.10, "coloured": 0.20, "collage": 0.20}
"""Of the groups of examples in what a denoiser is shown."""


@dataclass(frozen=True, kw_only=True)
class FolderTraining:
    """Settings of every training that writes a pipeline folder.

    Attributes:
        out: Folder to write; it must not exist, or be a pipeline folder, which is replaced.
        data: Folder in which, or below which, the npm packages were unpacked.
        init: Pipeline folder to start from; None for the bundled `emoji-sd`.
        minutes: Length of the run by the clock, from the first line to the last step; or
        iterations: Length of the run in steps (then the result depends on nothing but the seed).
        batch: Pictures a step.
        lr: Peak learning rate, reached after 50 iterations.
        ema: Decay of the averaged weights, which are what is saved.
        seed: Of the pictures, the initial weights, the batches and the noise.
        threads: CPU threads; 0 leaves torch's own setting.
    """

    out: str | Path
    data: str | Path
    init: str | Path | None = None
    minutes: float | None = None
    iterations: int | None = None
    batch: int
    lr: float
    ema: float
    seed: int = 0
    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining(FolderTraining):
    """Settings of the trainings of a denoiser on the emoji and pictures composed of them.

    The `compositions.txt` of `init` is the held-out test set, its `captions.txt` the captions that
    are shown most.

    Attributes:
        coloured: How many recoloured pictures are prepared.
        collages: How many collages are prepared.
        checkpoint_minutes: How often what is kept is brought up to date during the run.
    """

    coloured: int = 5000
    collages: int = 5000
    checkpoint_minutes: float

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1:
            raise UserError(f"training: ema is {self.ema}, expected at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run did: `losses` has one value an iteration, `captions` every distinct caption."""

    out: Path
    seconds: float
    losses: list[float]
    captions: list[str]


def load_examples(settings: DenoiserTraining, init: Path) -> tuple[list[Example], list[str]]:
    """The examples of a run, and their distinct captions.

    Raises:
        UserError: The data cannot be used; the message says what to do.
    """
    mix = Mix(
        held_out=HeldOut(read_lines(init / "compositions.txt")),
        focus=frozenset(read_lines(init / "captions.txt")),
        coloured=settings.coloured,
        collages=settings.collages,
        seed=settings.seed,
    )
    examples = build_examples(load_emoji(settings.data), mix)
    return examples, list(dict.fromkeys(example.caption for example in examples))


def data_card(settings: DenoiserTraining, captions: int) -> str:
    """What the card of a model says of its data, attributions included."""
    return f"""\
- Data: Noto emoji (google/noto-emoji images, Apache-2.0) from the npm package `{PACKAGE}`
  {VERSION}, plain, moved, recoloured ({settings.coloured}) and as collages ({settings.collages}):
  {captions} captions (`captions-all.txt`). The prompts of `compositions.txt` were held out. The VAE
  was also shown Twemoji (graphics CC-BY 4.0)."""


def progress_card(losses: Sequence[float]) -> str:
    """What the card of a model says of how far it has come."""
    recent = losses[-100:]
    return f"""\
- So far {len(losses)} iterations; mean loss of the last {len(recent)}:
  {sum(recent) / max(len(recent), 1):.4f}."""
