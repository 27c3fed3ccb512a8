"""The dependency schedule of SRDS: counts against the formulae, orders against the definition."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from sidestep.kernels.core import PararealSchedule, Wavefront, parareal_cost, simulate_parareal

Chain = tuple[int, int]  # block, iterate


def split(N: int, B: int) -> list[int]:
    """Blocks whose sizes differ by one at most."""
    return [N * i // B for i in range(B + 1)]


def equal_splits() -> list[tuple[int, int]]:
    steps = (7, 13, 25, 49, 97, 100)
    return [(N, B) for N in steps for B in range(1, N + 1) if N % B == 0]


def uneven(seed: int) -> tuple[list[int], int]:
    """Bounds from any first step, and iterations."""
    rng = random.Random(seed)
    B = rng.randint(2, 9)
    bounds = [rng.randint(0, 50)]
    for _ in range(B):
        bounds.append(bounds[-1] + rng.choice([1, 2, 3, 4, 11]))
    return bounds, rng.randint(1, B)


def recurrence(bounds: list[int], K: int) -> list[int]:
    """T(B, p) for p = 0..K: T(i, p) = max(T(i-1, p-1) + m_i, T(i-1, p) + 1); exact boundaries take
    their place in later iterates."""
    m = [b - a for a, b in pairwise(bounds)]
    T = [[0] * (K + 1)]
    for i in range(1, len(m) + 1):
        above = T[-1]
        T.append([above[0] + 1] + [0] * K)
        for p in range(1, K + 1):
            by_fine = above[p - 1] + m[i - 1]
            T[i][p] = T[i][i] if p > i else by_fine if p == i else max(by_fine, above[p] + 1)
    return T[-1]


def chains(bounds: list[int], K: int) -> dict[Chain, int]:
    """Every chain of the definition, and its evaluations."""
    B = len(bounds) - 1
    return {
        (i, q): bounds[i] - bounds[i - 1] if q < K else 1
        for i in range(1, B + 1)
        for q in range(min(i - 1, K) + 1)
    }


def inputs_formed(bounds: list[int], K: int, taken: dict[Chain, list[int]]) -> dict[Chain, int]:
    """The tick after which each boundary (i, p) can be there; taken: ticks of each chain."""
    there: dict[Chain, int] = {}
    for i in range(1, len(bounds)):
        for p in range(min(i, K) + 1):
            needed = [there[i, p - 1]] if p else []
            needed += [taken[i, p][0]] if p < i else []
            needed += [taken[i, p - 1][-1]] if p else []
            there[i, p] = max(needed)
    return there


def check(front: Wavefront, bounds: list[int], K: int, width: int) -> None:
    """Every evaluation once, in order, within the width, and never before its input."""
    taken: dict[Chain, list[int]] = {}
    for tick, block, iterate, step in front.chart.tolist():
        ticks = taken.setdefault((block, iterate), [])
        assert step == bounds[block - 1] + len(ticks)
        assert not ticks or ticks[-1] < tick
        ticks.append(tick)
    assert {chain: len(ticks) for chain, ticks in taken.items()} == chains(bounds, K)
    there = inputs_formed(bounds, K, taken)
    for (block, iterate), ticks in taken.items():
        assert block == 1 or there[block - 1, iterate] < ticks[0]
    assert front.formed.tolist() == [there[len(bounds) - 1, p] + 1 for p in range(K + 1)]
    assert front.widths.sum() == front.evaluations and front.widths.min() > 0
    assert len(front.widths) == front.ticks == front.formed[-1]
    assert not width or front.widths.max() <= width
    assert not width or front.ticks >= -(-front.evaluations // width)


@pytest.mark.parametrize("N", [7, 13, 25, 49, 97, 100])
def test_ticks_and_evaluations_are_those_of_the_formulae(N: int) -> None:
    for B in [B for n, B in equal_splits() if n == N]:
        m, bounds = N // B, split(N, B)
        for K in sorted({0, *range(1, min(B, 5) + 1), B}):
            front = simulate_parareal(bounds, K)
            assert front.ticks == K * (m - 1) + B
            assert K < B or front.ticks == N
            assert front.evaluations == m * (K * B - K * (K - 1) // 2) + B - K
            assert front.evaluations == parareal_cost(bounds, K)
            assert front.widths.max() <= B
            assert front.formed.tolist() == [p * (m - 1) + B for p in range(K + 1)]
            for width in (B, B + 1):
                assert simulate_parareal(bounds, K, width).ticks == front.ticks


@pytest.mark.parametrize("N, B", [(7, 7), (13, 13), (25, 5), (49, 7), (97, 1), (100, 20)])
@pytest.mark.parametrize("width", [0, 1, 2, 3, 5])
def test_any_width_makes_every_evaluation_once_and_after_its_input(
    N: int, B: int, width: int
) -> None:
    bounds = split(N, B)
    for K in sorted({0, 1, min(B, 3), B}):
        check(simulate_parareal(bounds, K, width), bounds, K, width)


@pytest.mark.parametrize("seed", range(40))
def test_unequal_blocks_follow_the_recurrence(seed: int) -> None:
    bounds, K = uneven(seed)
    front = simulate_parareal(bounds, K)
    check(front, bounds, K, 0)
    assert front.formed.tolist() == recurrence(bounds, K)
    assert simulate_parareal(bounds, K, int(front.widths.max())).ticks == front.ticks
    for width in (1, 2, 3):
        check(simulate_parareal(bounds, K, width), bounds, K, width)


@pytest.mark.parametrize("N, B", [(25, 12), (50, 25), (100, 10), (100, 33), (961, 31)])
def test_few_slots_are_kept_busy(N: int, B: int) -> None:
    for K in (1, 2, 3, 5):
        for width in (2, 3, 4, 8):
            front = simulate_parareal(split(N, B), K, width)
            least = max(-(-front.evaluations // width), simulate_parareal(split(N, B), K).ticks)
            assert front.ticks < least + width


class Host:
    """Reports what happened in any order, and writes down what it was told to do."""

    def __init__(self, bounds: list[int], K: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.bounds, self.K = bounds, K
        self.core = PararealSchedule(bounds, K)
        self.running: dict[Chain, list[int]] = {}  # evaluations taken, and to take
        self.started: list[Chain] = []
        self.formed: list[tuple[int, int, bool]] = []
        self.start(self.core.begin())

    def start(self, chain: tuple[int, int, int, int]) -> None:
        block, iterate, first, evaluations = chain
        assert first == self.bounds[block - 1] and evaluations > 0
        self.started.append((block, iterate))
        self.running[block, iterate] = [0, evaluations]

    def turn(self) -> None:
        """One evaluation of one running chain."""
        chain = self.random.choice(sorted(self.running))
        self.running[chain][0] += 1
        taken, evaluations = self.running[chain]
        if taken == 1:
            self.form(chain, self.core.coarse(*chain))
        if taken == evaluations:
            del self.running[chain]
            self.form(chain, self.core.ended(*chain))

    def form(self, chain: Chain, boundaries: list[tuple]) -> None:
        for block, iterate, exact, started in boundaries:
            assert block == chain[0]
            assert exact == (iterate == block)
            self.formed.append((block, iterate, exact))
            assert (started is None) == (block == self.core.blocks)
            if started is not None:
                assert started[:2] == (block + 1, iterate)
                self.start(started)


@pytest.mark.parametrize("seed", range(30))
def test_reports_in_any_order_form_every_boundary_once_and_in_order(seed: int) -> None:
    bounds, K = uneven(seed)
    host = Host(bounds, K, seed)
    several = 0
    while host.running:
        before = len(host.formed)
        host.turn()
        several += len(host.formed) > before + 1
        assert host.core.finished == ((len(bounds) - 1, K) in {f[:2] for f in host.formed})
    assert host.core.finished
    B = len(bounds) - 1
    for i in range(1, B + 1):  # an exact boundary is the last of its block
        assert [p for block, p, _ in host.formed if block == i] == list(range(min(i, K) + 1))
    assert sorted(host.started) == sorted(chains(bounds, K))


def test_one_report_can_form_several_boundaries_of_a_block() -> None:
    core = PararealSchedule([0, 2, 4, 6], 3)
    core.begin()
    core.coarse(1, 0)
    core.ended(1, 0)  # x_1^0 and x_1^1 are there: chains (2, 0) and (2, 1) run
    assert core.coarse(2, 0) == [(2, 0, False, (3, 0, 4, 2))]
    assert core.coarse(2, 1) == core.ended(2, 1) == []
    assert core.ended(2, 0) == [(2, 1, False, (3, 1, 4, 2)), (2, 2, True, (3, 2, 4, 2))]


def test_the_coarse_solver_alone() -> None:
    front = simulate_parareal([3, 8, 9, 20], 0)
    assert front.chart.tolist() == [[0, 1, 0, 3], [1, 2, 0, 8], [2, 3, 0, 9]]
    assert np.array_equal(front.formed, [3])
    core = PararealSchedule([3, 8], 0)
    assert core.begin() == (1, 0, 3, 1)
    assert core.coarse(1, 0) == [(1, 0, False, None)]
    assert core.finished and core.ended(1, 0) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_limit_stops_what_has_not_started(seed: int) -> None:
    bounds, _ = uneven(seed)
    B = len(bounds) - 1
    host = Host(bounds, B, seed)
    limit = host.random.randint(0, B - 1)
    for _ in range(host.random.randint(0, 3 * B)):
        if host.running:
            host.turn()
    before = set(host.started)
    there = {(i, p) for i, p, _ in host.formed}
    host.core.limit(limit)
    assert host.core.iterations == limit
    while host.running:
        host.turn()
    assert host.core.finished
    late = set(host.started) - before
    assert all(q <= limit for _, q in late)
    expected = {(i, p) for i in range(1, B + 1) for p in range(min(i, limit) + 1)}
    assert {(i, p) for i, p, _ in host.formed} == expected | there


def test_a_limit_says_what_is_still_of_use() -> None:
    core = PararealSchedule([0, 4, 8, 12], 3)
    assert core.chain(3, 2) == (3, 2, 8, 4)
    core.limit(2)
    assert core.chain(3, 1) == (3, 1, 8, 4) and core.chain(3, 2) == (3, 2, 8, 1)
    core.limit(1)
    assert core.chain(3, 2) == (3, 2, 8, 0)
    core.begin()
    core.coarse(1, 0)
    core.coarse(2, 0)
    assert core.ended(1, 0) == [(1, 1, True, (2, 1, 4, 1))]  # for the coarse solver only


@pytest.mark.parametrize(
    ("bounds", "K", "sentence"),
    [
        ([0], 0, "0 blocks, expected 1 to 4096"),
        ([], 0, "-1 blocks, expected 1 to 4096"),
        ([0, 2, 2], 1, r"bounds\[2\] is 2, expected 3 to"),
        ([-1, 2], 1, r"bounds\[0\] is -1, expected 0 to"),
        ([0, 1 << 41], 1, r"bounds\[1\] is 2199023255552, expected 1 to"),
        ([0, 2, 4], 3, "3 iterations, expected 0 to the number of blocks, 2"),
        ([0, 2, 4], -1, "-1 iterations, expected 0 to"),
    ],
)
def test_numbers_are_checked(bounds: list[int], K: int, sentence: str) -> None:
    for call in (PararealSchedule, simulate_parareal, parareal_cost):
        with pytest.raises(ValueError, match=sentence):
            call(bounds, K)


def test_a_simulation_is_bounded() -> None:
    with pytest.raises(ValueError, match="a width of -1, expected 0 or more"):
        simulate_parareal([0, 2], 1, -1)
    with pytest.raises(ValueError, match="1099511627776 evaluations, expected at most 16777216"):
        simulate_parareal([0, 1 << 40], 1)


def test_reports_that_cannot_be_are_refused_and_change_nothing() -> None:
    core = PararealSchedule([0, 2, 4, 6], 2)
    for refused, sentence in (
        (
            lambda: core.coarse(1, 0),
            r"first evaluation of chain \(1, 0\), expected a chain that has",
        ),
        (lambda: core.limit(3), "a limit of 3 iterations, expected 0 to 2"),
        (lambda: core.limit(-1), "a limit of -1 iterations, expected 0 to 2"),
        (
            lambda: core.chain(3, 3),
            r"chain \(3, 3\), expected a block of 1 to 3, and an iterate of",
        ),
        (lambda: core.chain(0, 0), r"chain \(0, 0\), expected a block of 1 to 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            refused()
    core.begin()
    for refused, sentence in (
        (core.begin, "begin twice, expected once"),
        (lambda: core.ended(1, 0), r"end of chain \(1, 0\), expected its first evaluation before"),
        (lambda: core.coarse(2, 0), r"of chain \(2, 0\), expected a chain that has started"),
        (lambda: core.coarse(4, 0), r"of chain \(4, 0\), expected a chain that has started"),
        (lambda: core.ended(1, 1), r"the end of chain \(1, 1\), expected a chain that has started"),
    ):
        with pytest.raises(ValueError, match=sentence):
            refused()
    assert core.coarse(1, 0) == [(1, 0, False, (2, 0, 2, 2))]
    with pytest.raises(ValueError, match=r"first evaluation of chain \(1, 0\) twice"):
        core.coarse(1, 0)
    assert core.ended(1, 0) == [(1, 1, True, (2, 1, 2, 2))]
    with pytest.raises(ValueError, match=r"the end of chain \(1, 0\) twice, expected once"):
        core.ended(1, 0)
    assert core.coarse(2, 0) == [(2, 0, False, (3, 0, 4, 2))]
