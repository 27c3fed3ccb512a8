"""Plans on disk: one safetensors file, readable from any language without unpickling anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from sidestep.runtime.files import write_whole
from sidestep.runtime.plan import _ARRAYS, Plan
from sidestep.runtime.thresholding import DynamicThreshold

_FORMAT = "sidestep-plan-1"


def save(plan: Plan, path: Path) -> None:
    """Writes ``plan`` to ``path``, whole or not at all."""
    arrays = {k: v for k in _ARRAYS if (v := getattr(plan, k)) is not None}
    metadata = {
        "format": _FORMAT,
        "name": plan.name,
        "initial_scale": plan.initial_scale.hex(),
        "threshold": json.dumps(asdict(plan.threshold) if plan.threshold else None),
        "digest": plan.digest,
    }
    write_whole(path, to_bytes(arrays, metadata=metadata))


def load(path: Path) -> Plan:
    """Reads a plan and checks its digest.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a plan, or it was altered.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Plan.load: no file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"format is {metadata.get('format')!r}, expected {_FORMAT!r}")
            threshold = json.loads(metadata["threshold"])
            plan = Plan(
                name=metadata["name"],
                initial_scale=float.fromhex(metadata["initial_scale"]),
                threshold=DynamicThreshold(**threshold) if threshold else None,
                **{key: file.get_tensor(key) for key in file.keys() if key in _ARRAYS},
            )
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Plan.load: {path} is not a plan: {error}") from error
    if plan.digest != metadata.get("digest"):
        raise ValueError(f"Plan.load: {path} was altered, its digest does not match its contents")
    return plan
