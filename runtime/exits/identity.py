"""Which model something was trained for: its shape exactly, its weights up to their dtype."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 8
"""Numbers that are looked at in every parameter, evenly spaced."""

_TOLERANCE = 2.0**-6
"""Relative: four times what a weight loses in bfloat16."""


def model_hash(model: nn.Module) -> str:
    """SHA-256 of the class, the configuration and the names and shapes of all parameters.

    What a configuration says of the folder and the version that it came from does not count.
    """
    config = {k: v for k, v in dict(getattr(model, "config", {})).items() if k[:1] != "_"}
    shapes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    text = json.dumps([type(model).__name__, config, shapes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def sample_weights(model: nn.Module) -> Tensor:  # [parameters * SAMPLES] fp32
    """Some of the weights, the same ones each time.

    Raises:
        ValueError: They are not there to be read.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"the weights of {type(model).__name__} are not in memory (sequential offload); enable "
            "the method before enable_sequential_cpu_offload"
        )
    return torch.stack([_some(parameter) for parameter in model.parameters()]).flatten().cpu()


def _some(parameter: Tensor) -> Tensor:  # [SAMPLES]
    flat = parameter.detach().flatten()
    places = torch.linspace(0, len(flat) - 1, SAMPLES, dtype=torch.float64).long()
    return flat[places.to(flat.device)].float()


def same_weights(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two of `sample_weights` are of one model, perhaps in different dtypes."""
    if ours.shape != theirs.shape:
        return False
    return bool(torch.isclose(ours, theirs, rtol=_TOLERANCE, atol=1e-6).all())


def difference(model: Any, name: str, digest: str, weights: Tensor) -> str:
    """How a model differs from the one of these three; empty if it does not."""
    if type(model).__name__ != name:
        return f"it is for a {name}, this is a {type(model).__name__}"
    if model_hash(model) != digest:
        return f"it is for another {name} (configuration or shapes differ)"
    if not same_weights(sample_weights(model), weights):
        return f"it is for a {name} with other weights"
    return ""
