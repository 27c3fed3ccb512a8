"""What a criterion makes of a row has the same bits whatever rows are beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criteria.gate import row_mean
from sidestep.runtime.methods.criteria.learned import SIGNALS, load_predictor, sharpened
from sidestep.runtime.methods.criteria.outputs import row_sum
from sidestep.runtime.methods.criteria.reused import _share, rms
from sidestep.runtime.methods.criterion import Course, Decision, Observation

STEPS = 16
LOG_SNR = [-3 + 0.3 * k for k in range(STEPS)]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """So that torch has something to split a row over."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(2))
def test_the_number_of_the_learned_criterion(seed: int) -> None:
    """torch rounds a power in the tail of a batch otherwise than before it."""
    f, signals = load_predictor(None), 2 * randn(64, len(SIGNALS), seed=seed)
    sizes = 3 * torch.rand(64, generator=torch.Generator().manual_seed(seed))

    def number(rows: slice) -> Tensor:
        return sharpened((0.01 * sizes[rows].clone()).log() + f(signals[rows].clone()))

    together = number(slice(None))
    for count in range(1, 18):
        for first in range(0, 64 - count, 5):
            rows = slice(first, first + count)
            assert torch.equal(number(rows), together[rows]), rows
    errors = 0.01 * sizes.double() * f(signals).double().exp()
    relative = errors / 0.008
    assert (relative > 1).any() and (relative < 1).any()
    expected = 0.008 * torch.where(relative > 1, relative**1.4, relative**0.3)
    torch.testing.assert_close(together.double(), expected, rtol=1e-5, atol=0)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "row_sum": row_sum,
    "row_mean": row_mean,
    "rms": rms,
    "share": lambda x: _share(x, x + 0.3 * x.flip(-1)),
}


@pytest.mark.parametrize("size", [1, 50, 2049, 70001])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_sums_over_rows(name: str, size: int, two_threads: None) -> None:
    reduce, x = REDUCTIONS[name], randn(3, size, seed=size)
    together = reduce(x)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 3), slice(1, 3)):
        assert torch.equal(reduce(x[rows].clone()), together[rows])


def test_sums_are_sums() -> None:
    x = randn(3, 4, 33, 57)
    wide = x.double().flatten(1)
    torch.testing.assert_close(row_sum(x).double(), wide.sum(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(rms(x).double(), wide.square().mean(1).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(row_mean(x).double(), wide.abs().mean(1), rtol=1e-6, atol=0)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(row_sum(last), row_sum(x))


def decisions(outputs: Tensor) -> list[Decision]:
    """The default criterion on one output after another, ``[K, rows, ...]``."""
    rows = outputs.shape[1]
    criterion = Adaptive().criterion()
    criterion.start(Course(rows=rows, steps=STEPS, log_snr=LOG_SNR, prediction="epsilon"))
    computed, made = [True] * rows, []
    for k, u in enumerate(outputs[:-1]):
        made.append(
            criterion.observe(Observation(step=k, x=u, x_next=u, output=u, computed=computed))
        )
        computed = made[-1].compute
    return made


def test_decisions_of_the_default_mode() -> None:
    shape, rows, steps = (4, 8, 8), 17, torch.arange(STEPS).view(-1, 1, 1, 1, 1)
    straight, bent = 0.05 * randn(rows, *shape, seed=1), 0.003 * randn(rows, *shape, seed=2)
    noise = 0.03 * randn(STEPS, rows, *shape, seed=3).cumsum(0)
    outputs = randn(rows, *shape) + steps * straight + steps**2 * bent + noise
    together = decisions(outputs)
    compared = 0
    for row in range(rows):
        for alone, beside in zip(decisions(outputs[:, row : row + 1]), together, strict=True):
            assert alone.compute[0] == beside.compute[row]
            if alone.value is not None and beside.value is not None:
                assert torch.equal(alone.value[0], beside.value[row])
                compared += 1
            if alone.weights is not None and beside.weights is not None:
                assert tuple(alone.weights[0]) == tuple(beside.weights[row])
    assert compared > 50
