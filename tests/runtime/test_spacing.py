"""Blocks of equal length in the log-SNR."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from engine_cases import latents, plan_of
from hypothesis import given
from hypothesis import strategies as st

from sidestep.runtime.engine import Engine, Request
from sidestep.runtime.methods.spacing import log_snr_bounds
from sidestep.runtime.methods.srds import SRDS

COURSES = st.builds(
    lambda first, lengths, noise, falls: (
        (-1 if falls else 1)
        * np.array([-np.inf if noise else first, *(first + np.cumsum(lengths))])
    ),
    st.floats(-10, 10),
    st.lists(st.floats(0, 3), max_size=60),
    st.booleans(),
    st.booleans(),
)


@given(COURSES, st.data())
def test_bounds_ascend_from_0_to_n_for_every_number_of_blocks(
    snr: np.ndarray, data: st.DataObject
) -> None:
    steps = len(snr)
    blocks = data.draw(st.one_of(st.integers(1, steps), st.just(steps)))
    bounds = log_snr_bounds(snr, blocks)
    assert bounds[0] == 0 and bounds[-1] == steps and len(bounds) == blocks + 1
    assert all(a < b for a, b in pairwise(bounds))
    assert bounds == log_snr_bounds(snr.copy(), blocks)
    if blocks == steps:
        assert bounds == tuple(range(steps + 1))


@given(
    st.sampled_from([7, 13, 31, 53, 97]),
    st.integers(2, 7),
    st.randoms(use_true_random=False),
)
def test_blocks_are_as_equal_in_lambda_as_their_steps_allow(
    steps: int, blocks: int, random: Any
) -> None:
    lengths = np.array([random.uniform(0.5, 1.0) for _ in range(steps - 1)])
    lengths = np.append(lengths, lengths[-1])
    begins = np.append(0.0, np.cumsum(lengths))
    bounds = log_snr_bounds(begins[:-1] - 3.0, blocks)
    even = begins[-1] / blocks
    if lengths.max() < even:
        found = np.diff(begins[list(bounds)])
        assert np.abs(found - even).max() <= lengths.max() + 1e-9


def test_bounds_of_known_courses() -> None:
    assert log_snr_bounds(np.arange(12.0), 4) == (0, 3, 6, 9, 12)
    assert log_snr_bounds(np.array([0.0, 0.1, 0.2, 0.3, 1.3, 2.3]), 3) == (0, 4, 5, 6)
    assert log_snr_bounds(np.array([-np.inf, 0.0, 1.0, 2.0]), 2) == (0, 2, 4)
    assert log_snr_bounds(np.array([-np.inf]), 1) == (0, 1)
    assert log_snr_bounds(np.array([-np.inf, 3.0]), 2) == (0, 1, 2)
    assert log_snr_bounds(np.full(6, 2.0), 3) == (0, 2, 4, 6)
    method = SRDS(blocks=5, spacing="log-snr")
    plan = plan_of("ddim", 23)
    assert plan.log_snr is not None
    assert method.bounds(plan) == log_snr_bounds(plan.log_snr, 5)
    assert method.rows(23) == 6


def test_spacings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="spacing is 'lambda', expected one of: 'steps', 'log-snr"):
        SRDS(spacing="lambda")
    with pytest.raises(ValueError, match=r"spacing is 'log-snr' and blocks are \[0, 4, 9\], expec"):
        SRDS(spacing="log-snr", blocks=[0, 4, 9])
    spaced = SRDS(spacing="log-snr", blocks=3)
    unknown = replace(plan_of("ddim", 12), log_snr=None, name="DDIM of no lambda")
    with pytest.raises(ValueError, match="and DDIM of no lambda does not tell its log-SNR"):
        spaced.bounds(unknown)
    with pytest.raises(ValueError, match="and a number of steps, 12, does not tell its log-SNR"):
        spaced.bounds(12)
    with pytest.raises(ValueError, match="3 blocks of 2 steps, expected at most 2"):
        spaced.bounds(plan_of("ddim", 2))
    with pytest.raises(ValueError, match="and DDIM of no lambda does not tell its log-SNR"):
        Engine((3, 5)).submit(Request(unknown, latents(1, 1), method=spaced))
