"""Picks the backend and device of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Set by elsewhere.py, which runs these tests again in processes of their own.
BACKENDS = os.environ.get("KERNEL_TEST_BACKENDS", "reference native").split()
DEVICE = os.environ.get("KERNEL_TEST_DEVICE", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend of this process."""
    from sidestep.kernels import use_backend

    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device() -> str:
    """The device of this process's run."""
    return DEVICE
