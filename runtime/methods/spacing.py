"""Where blocks of nearly equal length in the log-SNR begin and end."""

from __future__ import annotations

import numpy as np


def log_snr_bounds(
    log_snr: np.ndarray,  # [N]
    blocks: int,
) -> tuple[int, ...]:  # [B + 1]
    """Bounds of so many blocks, from 0 to N, each of at least one step.

    The length of step k is ``|lambda_{k+1} - lambda_k|``.  Where that is infinite, as from pure
    noise, and for the last step, whose end a plan does not tell, it is the length of the nearest
    step that has one.  Bound i is the step that begins closest to i / B of the whole length, but
    after bound i - 1 and early enough to leave a step for every block behind it.

    Args:
        log_snr: lambda at the beginning of every step, of which some may be infinite.
        blocks: B, 1 to N.
    """
    steps = len(log_snr)
    with np.errstate(invalid="ignore"):  # between two infinite ones
        lengths = np.append(np.abs(np.diff(log_snr)), np.nan)  # [N]
    known = np.flatnonzero(np.isfinite(lengths))
    if not len(known) or not lengths[known].any():
        lengths = np.ones(steps)
    else:
        nearest = np.abs(np.arange(steps)[:, None] - known).argmin(1)
        lengths = lengths[known[nearest]]
    begins = np.append(0.0, np.cumsum(lengths))  # [N + 1]
    bounds = [0]
    for i in range(1, blocks):
        closest = int(np.abs(begins - begins[-1] * i / blocks).argmin())
        bounds.append(min(max(closest, bounds[-1] + 1), steps - (blocks - i)))
    return (*bounds, steps)
