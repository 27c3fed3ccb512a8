"""The guidance weights of a step, seen from what a pipeline makes of known model outputs.

A pipeline combines its branches linearly, ``c = sum_g w_g p_g``. With a known random tensor ``p_g``
for every branch, the weights are the least-squares solution; a rest says that the combination is
not linear, and a sum other than 1 that it was scaled by something that depends on the outputs (or
by -1, which some pipelines do).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_REST = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest rest, relative: what rounding in the pipeline's arithmetic leaves of a combination with
weights of up to some ten. Guidance that is not linear leaves more than a tenth."""


def probe(shape: Sequence[int], step: int, number: int, device: torch.device) -> Tensor:
    """A random tensor that stands for a network's output, in fp32 whatever the network's dtype.

    It is another one at each step: what a pipeline makes of it and gives to a network is then seen
    to change.

    Args:
        shape: Of the output.
        step: The step it is for.
        number: Of the tensor in that step.
        device: Where it is to be.
    """
    generator = torch.Generator().manual_seed(1_000_003 * step + number)
    return torch.randn(tuple(shape), generator=generator).to(device)


def fit_weights(
    combined: Tensor,  # [R, ...]
    probes: list[Tensor],  # G of [R, ...]
) -> list[float] | None:  # [G]
    """``w`` of ``combined = sum_g w_g probes_g``; None where no such weights exist.

    Args:
        combined: What the pipeline made of the probes; its dtype says how finely.
        probes: What it was given.
    """
    basis = torch.stack([p.double().flatten() for p in probes], dim=1)  # [N, G]
    target = combined.double().flatten()
    if not bool(target.isfinite().all()):
        return None
    weights = torch.linalg.lstsq(basis, target[:, None]).solution[:, 0]
    rest = (basis @ weights - target).norm() / target.norm().clamp(min=1e-30)
    limit = _REST.get(combined.dtype, _REST[torch.float32])
    if not float(rest) < limit:
        return None
    return [float(w) for w in weights]
