"""A course of four steps, and exits whose numbers are easy to follow by hand."""

from __future__ import annotations

from typing import Any

import torch

from sidestep.runtime.exits.file import Exits, Measured
from sidestep.runtime.exits.modules import (
    random_probes,
    random_uncertainty,
    zero_translators,
)
from sidestep.runtime.methods.criterion import Course

COURSE = Course(steps=4, log_snr=(-3.0, -2.0, 0.0, 2.0), prediction="epsilon")


def tiny_exits(kind: str = "excess", **changes: Any) -> Exits:
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {
        "kind": kind, "model": "Toy", "model_hash": "0", "model_weights": torch.zeros(2),
        "blocks": 4, "after": (1, 3), "probes": random_probes(2, 3, 2, generator),
    }  # fmt: skip
    if kind == "excess":
        values |= {
            "translators": zero_translators(2, 2),
            "uncertainty": random_uncertainty(2, 3, 5, generator),
            "measured": Measured(
                log_snr=torch.tensor([-2.0, 2.0]),
                errors=torch.tensor([[0.4, 0.1], [0.2, 0.05]]),
                sensitivity=torch.tensor([2.0, 8.0]),
                stale=torch.tensor([[0.1, 0.1], [0.05, 0.05], [0.02, 0.02]]),
                growth=torch.ones(3, 2),
            ),
        }
    return Exits(**{**values, **changes})
