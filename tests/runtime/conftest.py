"""Fixtures of the tests of plans and solvers."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def analytic() -> ModuleType:
    """`analytic.py` beside this file."""
    import analytic as targets

    return targets
