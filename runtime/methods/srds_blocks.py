"""How many blocks: what the planner picks, and what SRDS takes where no latency was measured.

The planner (`sidestep.runtime.planner`) takes the seconds of a call of every size, and picks among
`block_counts`.  Where nothing was measured the same rule is applied to a device on which a call for
all blocks takes as long as one for one, so that only the calls in a row count:

    B = argmin over the counts of E[T(B, K)],    K around K_hat(B),    T(B, K) = K (m - 1) + B

for equal blocks, and from the schedule itself (`simulate_parareal`) where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from sidestep.kernels.core import parareal_cost, simulate_parareal

_FINEST = 40  # block lengths that are tried for one number of steps, about
_MOST = 4096  # blocks that the schedule takes

_EXPECTED = (
    (0.03, 1.0),
    (0.05, 1.4),
    (0.06, 1.8),
    (0.08, 3.0),
    (0.1, 3.5),
    (0.16, 4.0),
    (0.3, 8.0),
)
"""K_hat by the share of the trajectory that a block has, 1 / B."""


def expected_iterations(blocks: int) -> float:
    """K_hat: iterations that an image needs on average at the default tolerance of 0.05.

    It depends on the share of a block in the trajectory, hardly on the number of steps, and most
    on the image: 1 to 9. Measured on the bundled model (DDIM, guidance 7.5, 2 to 4 novel prompts
    each) with the Krylov coarse solver; `sidestep bench srds --steps N --blocks B` measures such a
    column, and docs/results/srds.md has those of the default number of blocks:

        N, steps of a block    100, 3  100, 5  50, 3  100, 7  25, 2  50, 4  100, 10  25, 3  25, 4
        1 / B                  0.03    0.05    0.06   0.07    0.08   0.08   0.10     0.11   0.14
        K, mean                1.0     1.3     1.8    2.5     4.0    2.8    3.5      3.8    3.8

    Longer blocks are extrapolated: they are exact, and slow, after as many iterations as blocks.
    """
    shares, counts = zip(*_EXPECTED, strict=True)
    return min(float(blocks), float(np.interp(1 / blocks, shares, counts)))


def block_counts(steps: int) -> list[int]:
    """Numbers of blocks worth a try, descending: from two steps a block to two blocks.

    All of them up to about 40 lengths, then in steps of a few percent.
    """
    lengths = np.unique(np.geomspace(2, max(2, steps / 2), _FINEST).round().astype(int))
    counts = {-(-steps // int(m)) for m in lengths}
    return sorted((B for B in counts if 1 < B < min(steps, _MOST + 1)), reverse=True)


def equal_bounds(steps: int, blocks: int) -> tuple[int, ...]:  # [B + 1]
    """Where blocks of nearly equal length begin and end."""
    return tuple(round(i * steps / blocks) for i in range(blocks + 1))


@lru_cache(maxsize=256)
def default_blocks(steps: int) -> int:
    """B for a plan of so many steps: the fewest expected calls in a row, then evaluations.

    Where none of the counts is expected to save a call, which is so up to 10 steps or so, blocks of
    two steps: an image that needs a single iteration is the quicker for them.
    """
    counts = block_counts(steps)
    if not counts:
        return max(1, -(-steps // 2))

    def expected(blocks: int) -> tuple[float, float]:
        bounds, K = equal_bounds(steps, blocks), expected_iterations(blocks)
        formed = simulate_parareal(bounds, math.ceil(K)).formed
        ticks = _mean_around(K, lambda k: float(formed[k]))
        evaluations = _mean_around(K, lambda k: float(parareal_cost(bounds, k)))
        return round(ticks, 6), round(evaluations, 6)

    best = min(counts, key=expected)
    return best if expected(best)[0] < steps else counts[0]


def _mean_around(K: float, value: Callable[[int], float]) -> float:
    """What is expected of ``value`` where the iterations are K in the mean."""
    low, part = math.floor(K), K - math.floor(K)
    return (1 - part) * value(low) + (part * value(low + 1) if part else 0.0)
