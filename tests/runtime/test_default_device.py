"""A default device of torch, which hosts set around everything, reaches nothing of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import conditioning, latents, plan_of, solo
from torch import Tensor

from sidestep.runtime.engine import Request
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criteria import CRITERIA, learned
from sidestep.runtime.sample import sample
from sidestep.runtime.summary import Summary

SHAPE, STEPS = (4, 8, 8), 16
SIGMAS = [14.6 * 0.7**k for k in range(STEPS)] + [0.0]
START, TEXT = latents(3, 2, SHAPE), conditioning(3, 2, 2)
Made = tuple[Tensor, Summary]


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """Of data at +-1, roughly."""
    return torch.tanh(x / (sigma.view(-1, 1, 1, 1) ** 2 + 0.2))


def by_sample(method: Adaptive) -> Made:
    """By the stepwise driver."""
    shown: list[Summary] = []
    made = sample(denoise, 14.6 * START, SIGMAS, disable=True, method=method, report=shown.append)
    return made, shown[0]


def by_engine(method: Adaptive) -> Made:
    """By the engine, with two guidance branches."""
    plan = plan_of("dpmsolver++2m", STEPS)
    result = solo(Request(plan, START, TEXT, guidance=(-1.5, 2.5), method=method))
    assert result.error is None and result.x is not None
    return result.x, result.summary


@pytest.mark.parametrize("make", [by_sample, by_engine])
@pytest.mark.parametrize("mode", CRITERIA)
def test_a_run_inside_another_default_device(mode: str, make: Callable[[Adaptive], Made]) -> None:
    own: Any = CRITERIA[mode].DEFAULTS.threshold
    method = Adaptive(mode=mode, threshold=100 * own)
    made = []
    for device in (contextlib.nullcontext(), torch.device("meta")):
        learned._read.cache_clear()
        with device:
            made.append(make(method))
            str(made[-1][1])
    (expected, plain), (x, summary) = made
    assert torch.equal(x, expected) and summary.skip_map == plain.skip_map
    assert not all(map(all, plain.skip_map))
