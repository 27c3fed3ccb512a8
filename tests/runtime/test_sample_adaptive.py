"""`sample` with the default method: fewer calls, and nearly what all of them give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.sample import sample
from sidestep.runtime.summary import Summary

STEPS = 30


def karras() -> list[float]:
    """EDM eq. 5 with rho = 7, and 0 at the end."""
    high, low = 14.6 ** (1 / 7), 0.03 ** (1 / 7)
    return [(high + i / (STEPS - 1) * (low - high)) ** 7 for i in range(STEPS)] + [0.0]


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean of two points at +-1, smoothed."""
    return torch.tanh(x / (sigma.view(-1, 1, 1, 1) ** 2 + 0.2))


@pytest.mark.parametrize("solver", ["euler", "dpmsolver++2m"])
def test_fewer_calls_and_nearly_the_same(solver: str) -> None:
    x = 14.6 * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes: list[int] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        sizes.append(len(x))
        return denoise(x, sigma)

    reports: list[Summary] = []

    def run(start: Tensor) -> Tensor:
        return sample(
            model, start, karras(), disable=True, solver=solver,
            method=Adaptive(), report=reports.append,
        )  # fmt: skip

    full = sample(denoise, x, karras(), disable=True, solver=solver)
    ours = run(x)
    assert sum(sizes) == sum(reports[0].nfe) and len(sizes) == reports[0].ticks
    assert all(STEPS / 4 < nfe < 0.8 * STEPS for nfe in reports[0].nfe)
    error = (ours - full).square().mean((1, 2, 3)).sqrt() / full.std((1, 2, 3))
    assert 0 < float(error.min()) and float(error.max()) < 0.05
    for row in range(3):
        assert torch.equal(run(x[row : row + 1])[0], ours[row])
        assert reports[-1].skip_map == (reports[0].skip_map[row],)
