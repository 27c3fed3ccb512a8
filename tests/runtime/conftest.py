"""Fixtures of the tests of plans and solvers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

# Importable by its stem: under importlib mode a test cannot import its neighbour.
_CASES = Path(__file__).with_name("engine_cases.py")
_spec = importlib.util.spec_from_file_location(_CASES.stem, _CASES)
assert _spec is not None and _spec.loader is not None
sys.modules[_CASES.stem] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_CASES.stem])


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
