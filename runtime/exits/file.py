"""The exits file: translators, probes, uncertainty, what a plan is made from, and whose they are.

One safetensors file, with one string of JSON as metadata. Its tensors, with K exits after the
blocks `after`, width D and P probes:

    probes.weight [K, P, D], probes.time [K, P, TIME], probes.bias [K, P]
    translators.matrix [K, D, D], translators.offset [K, D]                      excess
    uncertainty.inner [K, 2 P + 3, units], uncertainty.outer [K, units + 1, 2]   excess
    measured.log_snr [T], measured.errors [K, T], measured.sensitivity [T],
    measured.stale [K + 1, T], measured.growth [K + 1, T]                        excess
    model.weights: `sidestep.runtime.identity`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from sidestep.runtime.exits.modules import TIME, Parts, Probes, Translators, Uncertainty
from sidestep.runtime.files import write_whole
from sidestep.runtime.identity import difference

FORMAT = "sidestep-exits-2"
KINDS = ("excess", "faithful")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured(Parts):
    """What was measured along the training trajectories, from which plans are made.

    Attributes:
        log_snr: ``[T]`` lambda of their steps, increasing.
        errors: ``[K, T]`` RMS over samples of the guided output's error at each exit.
        sensitivity: ``[T]`` what an error that a step carries into the latents (`carried`) leaves
            in the finished picture.
        stale: ``[K + 1, T]`` RMS error where the last outputs (first line), or what lies behind an
            exit (its line), are continued over a distance of 1 in lambda (`menu`).
        growth: ``[K + 1, T]`` by which power of the distance it grows.
    """

    log_snr: Tensor
    errors: Tensor
    sensitivity: Tensor
    stale: Tensor
    growth: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Exits:
    """All of a file.

    Attributes:
        kind: ``"excess"``: exits of a frozen model; ``"faithful"``: AdaDiff's, after every block.
        model: Class of the transformer.
        model_hash: `identity.model_hash` of it.
        model_weights: `identity.sample_weights` of it.
        blocks: How many it has.
        after: ``[K]`` blocks that a row has passed at each exit, increasing.
        probes: Their scores decide.
        translators: None for ``"faithful"``: hidden states go to the head as they are.
        uncertainty: None likewise.
        measured: None likewise.
        trained: What else is to be known: steps, scheduler, guidance, and how it was made.
    """

    kind: str
    model: str
    model_hash: str
    model_weights: Tensor
    blocks: int
    after: tuple[int, ...]
    probes: Probes
    translators: Translators | None = None
    uncertainty: Uncertainty | None = None
    measured: Measured | None = None
    trained: Mapping[str, Any] = field(default_factory=dict)

    def check_model(self, model: Any) -> None:
        """Raises ValueError if the file is of another model."""
        differs = difference(model, self.model, self.model_hash, self.model_weights)
        if differs:
            raise ValueError(
                f"EarlyExit: the exits file does not fit: {differs}; "
                "`sidestep train exits` makes one for this model"
            )


_PARTS: dict[str, type[Parts]] = {
    "probes": Probes,
    "translators": Translators,
    "uncertainty": Uncertainty,
    "measured": Measured,
}


def save_exits(exits: Exits, path: Path) -> None:
    """Writes the file, whole or not at all."""
    tensors = {"model.weights": exits.model_weights.contiguous()}
    for name in _PARTS:
        part: Parts | None = getattr(exits, name)
        if part is not None:
            tensors |= {
                f"{name}.{key}": tensor.detach().float().cpu().contiguous()
                for key, tensor in part.tensors().items()
            }
    head = {
        "format": FORMAT, "kind": exits.kind, "model": exits.model, "model_hash": exits.model_hash,
        "blocks": exits.blocks, "after": list(exits.after), "trained": dict(exits.trained),
    }  # fmt: skip
    write_whole(path, to_bytes(tensors, {"exits": json.dumps(head)}))


def load_exits(path: str | Path) -> Exits:
    """Reads the file.

    Raises:
        ValueError: There is no such file, or it is no exits file, or its parts do not fit together.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.device("cpu"),
            safe_open(Path(path), framework="pt") as opened,
        ):
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"EarlyExit: cannot read the exits file {path}: {error}") from error
    try:
        return _assembled(json.loads(metadata["exits"]), tensors)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"EarlyExit: {path} is no exits file of this version: {reason}") from error


def _assembled(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Exits:
    """Raises ValueError, KeyError or TypeError where something is missing or does not fit."""
    if head["format"] != FORMAT:
        raise ValueError(f"its format is {head['format']!r}, expected {FORMAT!r}")
    if head["kind"] not in KINDS:
        raise ValueError(f"its kind is {head['kind']!r}, expected one of {KINDS}")
    names = list(_PARTS) if head["kind"] == "excess" else ["probes"]
    parts: dict[str, Any] = {}
    for name in names:
        kind = _PARTS[name]
        keys = kind.__dataclass_fields__
        parts[name] = kind(**{key: tensors[f"{name}.{key}"] for key in keys})
    blocks, after = int(head["blocks"]), tuple(int(i) for i in head["after"])
    if not after or list(after) != sorted({*after}) or not 0 < after[0] <= after[-1] < blocks:
        raise ValueError(f"its exits are after blocks {list(after)} of {blocks}")
    exits = Exits(
        kind=head["kind"],
        model=str(head["model"]),
        model_hash=str(head["model_hash"]),
        model_weights=tensors["model.weights"],
        blocks=blocks,
        after=after,
        trained=dict(head["trained"]),
        **parts,
    )
    _check_shapes(exits)
    return exits


def _check_shapes(exits: Exits) -> None:
    if exits.probes.weight.ndim != 3:
        raise ValueError(f"probes.weight has shape {list(exits.probes.weight.shape)}")
    K, P, D = len(exits.after), *exits.probes.weight.shape[1:]
    expected: dict[str, tuple[int, ...]] = {
        "probes.weight": (K, P, D), "probes.time": (K, P, TIME), "probes.bias": (K, P),
    }  # fmt: skip
    if exits.uncertainty is not None and exits.measured is not None:
        units, steps = exits.uncertainty.outer.shape[1] - 1, len(exits.measured.log_snr)
        expected |= {
            "translators.matrix": (K, D, D), "translators.offset": (K, D),
            "uncertainty.inner": (K, 2 * P + 3, units), "uncertainty.outer": (K, units + 1, 2),
            "measured.log_snr": (steps,), "measured.errors": (K, steps),
            "measured.sensitivity": (steps,), "measured.stale": (K + 1, steps),
            "measured.growth": (K + 1, steps),
        }  # fmt: skip
        if steps == 0 or not bool((exits.measured.log_snr.diff() > 0).all()):
            raise ValueError("measured.log_snr does not increase")
        for key in ("errors", "sensitivity", "stale", "growth"):
            if not bool((getattr(exits.measured, key) > 0).all()):
                raise ValueError(f"measured.{key} holds numbers that are not above 0")
    for name, shape in expected.items():
        part, key = name.split(".")
        tensor: Tensor = getattr(getattr(exits, part), key)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds something else than finite numbers in float32")
