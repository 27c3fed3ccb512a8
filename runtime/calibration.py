"""A threshold that was chosen for a promise, as one small JSON file, and how settings take it in.

`sidestep calibrate` writes it. Any frozen settings with a ``threshold`` and a ``calibration`` call
`take_calibration` when they are made.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from sidestep.runtime.files import write_whole

FORMAT = "sidestep-calibration-1"
PROMISE = ("target", "calibration")
"""Settings that say what is promised, and where it is written."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was promised, for what, and how it came out.

    Attributes:
        method: The name of the settings' class.
        settings: All of them but the threshold, as `recorded` has them.
        threshold: The one chosen.
        target: What a picture has to keep to the full run, such as ``"psnr>=35"``.
        confidence: The share of pictures that were promised to keep it.
        model: The model's name or folder.
        model_hash: Of its weights.
        dtype: Of its weights, such as ``"float32"``.
        scheduler: Its class and its configuration.
        steps: Asked of the scheduler.
        guidance: The scale.
        curve: For every threshold tried, ascending: ``threshold``, ``kept`` of ``images`` pictures,
            ``bound`` on the share that do not, mean ``nfe``, and of early exit mean ``layers``.
        fresh: The threshold chosen, on the same prompts from fresh seeds: ``kept`` of ``images``,
            their ``rate``, the ``chance`` of as few if the promise holds, mean ``nfe`` and
            ``nfe_full``, and ``layers`` as above.
        seed: Of the calibration's first picture.
    """

    method: str
    settings: dict[str, Any]
    threshold: float
    target: str
    confidence: float
    model: str
    model_hash: str
    dtype: str
    scheduler: dict[str, Any]
    steps: int
    guidance: float
    curve: list[dict[str, float]] = field(default_factory=list)
    fresh: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def promise(self) -> str:
        """In a few words."""
        return f"{self.target} for {self.confidence:.0%} of pictures"

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        write_whole(Path(path), (json.dumps(self.document(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads the file.

        Raises:
            ValueError: There is none, or it is not a calibration.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"calibration: cannot read {path} as JSON: {error}") from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ValueError(
                f"calibration: {path} is not one, expected what `sidestep calibrate` writes"
            )
        try:
            made = cls(**document)
        except TypeError as error:
            raise ValueError(f"calibration: {path} is not one: {error}") from error
        if not isinstance(made.settings, dict) or not isinstance(made.scheduler, dict):
            raise ValueError(f"calibration: {path} is not one: its settings are no object")
        return made


def recorded(value: Any) -> Any:
    """A setting as a calibration has it: of a file the hash, of settings within settings all.

    A `Path` is what is read from it; text stays text.

    Raises:
        ValueError: There is no such file.
    """
    if isinstance(value, Path):
        try:
            return f"sha256:{hashlib.sha256(value.read_bytes()).hexdigest()}"
        except OSError as error:
            raise ValueError(f"calibration: cannot read {value}: {error}") from error
    if is_dataclass(value):
        names = [field.name for field in fields(value) if field.name not in PROMISE]
        return {name: recorded(getattr(value, name)) for name in names}
    return value


def take_calibration(settings: Any) -> None:
    """Puts the file's threshold, and the settings it holds for, into frozen settings.

    A field that is None was left out, and takes the file's value; any other one has to be the same.

    Args:
        settings: A frozen dataclass with the fields ``threshold``, ``target`` and ``calibration``,
            a path; None for nothing to do. Files it names are `Path`, and what may be left out is
            None then.

    Raises:
        ValueError: There is no such file, or it was made for another method or other settings, or
            promises something else than the target.
    """
    path, target, name = settings.calibration, settings.target, type(settings).__name__
    if path is None:
        if target is None:
            return
        raise ValueError(
            f"{name}: target is {target!r}, expected a calibration that promises it: "
            f'`sidestep calibrate --target "{target}" --out FILE`, calibration=FILE'
        )
    made = Calibration.load(path)
    if target is not None and target.replace(" ", "") != made.target.replace(" ", ""):
        raise ValueError(
            f"{name}: target is {target!r}, expected {made.target!r}, which is what calibration "
            f"{path} promises"
        )
    if made.method != name:
        raise ValueError(f"{name}: calibration {path} is of {made.method}, expected of {name}")
    found = {**made.settings, "threshold": made.threshold}
    known = {field.name for field in fields(settings) if field.name not in PROMISE}
    for setting in found:
        if setting not in known:
            raise ValueError(f"{name}: calibration {path} has a setting {setting!r}, unknown here")
    for setting, value in found.items():
        given = recorded(getattr(settings, setting))
        if given is None:
            object.__setattr__(settings, setting, value)
        elif given != value:
            raise ValueError(
                f"{name}: {setting} is {given!r}, expected {value!r} as in calibration {path}"
            )
