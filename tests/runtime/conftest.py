"""Fixtures of the tests of plans and solvers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def analytic() -> ModuleType:
    """`analytic.py` beside this file; under importlib mode a test cannot import its neighbour."""
    spec = importlib.util.spec_from_file_location(
        "sidestep_tests_analytic", Path(__file__).with_name("analytic.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
