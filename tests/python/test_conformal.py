"""Conformal risk control: worked examples, and that the promise holds over many draws."""

from __future__ import annotations

import numpy as np
import pytest

from sidestep import conformal

ALPHA, N, DRAWS = 0.1, 40, 4000
GRID = np.linspace(0.005, 0.4, 80)


def test_worked_example() -> None:
    """Of 4 pictures 0, 1, 1 and 3 are lost; the second is lost at the first threshold only."""
    losses = [[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1]]
    assert conformal.monotone(losses).tolist() == [
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 0, 1],
    ]
    assert conformal.bound(losses).tolist() == [0.2, 0.4, 0.6, 0.8]
    assert [conformal.choose(losses, alpha) for alpha in (0.19, 0.2, 0.5, 0.6, 0.9)] == [
        None,
        0,
        1,
        2,
        3,
    ]


def test_as_many_pictures_as_the_confidence_needs() -> None:
    for confidence, n in ((0.9, 9), (0.95, 19), (0.99, 99), (0.5, 1), (0.8, 4)):
        alpha = 1 - confidence
        assert conformal.fewest(alpha) == n
        assert conformal.choose(np.zeros((1, n)), alpha) == 0
        assert conformal.choose(np.zeros((1, n - 1)), alpha) is None


def test_chance_is_the_binomial_distribution() -> None:
    assert conformal.chance(2, 2, 0.9) == pytest.approx(1)
    assert conformal.chance(1, 2, 0.9) == pytest.approx(1 - 0.81)
    assert conformal.chance(0, 3, 0.9) == pytest.approx(0.001)
    assert conformal.chance(50, 64, 0.9) < 0.01 < conformal.chance(55, 64, 0.9)


def monotone_losses(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Picture i is lost above a limit that is uniform in [0, 1]: R(theta) = theta."""
    return (GRID[:, None] > draw.random(N)).astype(float), GRID


def falling_losses(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same, but every second threshold, by chance, forgives half of the pictures."""
    losses, risk = monotone_losses(draw)
    forgiven = (draw.random(losses.shape) < 0.5) & (np.arange(len(GRID)) % 2 == 1)[:, None]
    halved = np.where(np.arange(len(GRID)) % 2 == 1, risk / 2, risk)
    return np.where(forgiven, 0, losses), halved


@pytest.mark.parametrize("losses_of", [monotone_losses, falling_losses])
def test_the_promise_holds_on_average(losses_of) -> None:  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(0)
    lost, naive = [], []
    for _ in range(DRAWS):
        losses, risk = losses_of(draw)
        best = conformal.choose(losses, ALPHA)
        lost.append(0.0 if best is None else risk[best])
        allowed = np.flatnonzero(losses.mean(1) <= ALPHA)
        naive.append(risk[allowed[-1]] if len(allowed) else 0.0)
    error = 3 * np.std(lost) / DRAWS**0.5
    assert np.mean(lost) <= ALPHA + error
    assert np.mean(naive) > ALPHA + error  # what the correction is for


def test_the_promise_is_not_wasted() -> None:
    """Theorem 2: for monotone losses the risk is at least alpha - 2/(n+1), and a grid's spacing."""
    draw = np.random.default_rng(1)
    lost = []
    for _ in range(DRAWS):
        losses, risk = monotone_losses(draw)
        best = conformal.choose(losses, ALPHA)
        lost.append(0.0 if best is None else risk[best])
    assert np.mean(lost) >= ALPHA - 2 / (N + 1) - (GRID[1] - GRID[0])
