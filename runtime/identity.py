"""Which model something belongs to: all of it by a digest, or its weights up to their dtype.

A calibration holds for the very bits of a pipeline's networks (`weights_digest`). Exits, and what
else is trained for a model, fit it in any dtype: `model_hash` of its shape, `sample_weights` beside
it, and `difference` between the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 8
"""Numbers that are looked at in every parameter, evenly spaced."""

_TOLERANCE = 2.0**-6
"""Relative: four times what a weight loses in bfloat16."""

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
_DIGITS = 12  # of a digest
_DIGESTED = 4096  # numbers of each weight, evenly spaced


def digest(values: Any) -> str:
    """Equal for equal values: nested lists and tuples of tensors, numbers and strings.

    A tensor counts with its dtype, shape and bits, wherever it is; any other object by its type.
    """
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, list | tuple):
            sha.update(f"{type(value).__name__} {len(value)};".encode())
            for one in value:
                add(one)
        elif isinstance(value, Tensor):
            sha.update(f"{value.dtype} {list(value.shape)};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            sha.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            known = isinstance(value, _VALUES)
            sha.update(f"{repr(value) if known else type(value).__name__};".encode())

    add(values)
    return sha.hexdigest()[:_DIGITS]


def weights_digest(networks: Mapping[str, nn.Module]) -> str:
    """Of the weights of networks by name: shapes, dtypes and evenly spaced values.

    Raises:
        ValueError: Some of them are not there to be read.
    """
    found = []
    for name, network in sorted(networks.items()):
        for key, weight in sorted(network.state_dict().items()):
            _expect_in_memory(name, weight)
            flat = weight.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _DIGESTED)]
            found.append((name, key.replace("_orig_mod.", ""), list(weight.shape), some))
    return digest(found)


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
    for parameter in model.parameters():
        _expect_in_memory(type(model).__name__, parameter)
    return torch.stack([_some(parameter) for parameter in model.parameters()]).flatten().cpu()


def _expect_in_memory(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(
            f"enable: the weights of {name} are not in memory (sequential offload), so that nobody "
            "can tell which model it is; enable the method before enable_sequential_cpu_offload"
        )


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
