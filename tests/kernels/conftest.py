"""Makes the helper files importable by their stems, and picks the backend and device of a run.

`tests` itself must stay off sys.path: it holds a folder `runtime`, which would become importable.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for path in (HERE.parent / "tolerances.py", HERE / "solver_step_cases.py"):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

# Set by test_solver_step_elsewhere.py, which runs these tests again in processes of their own.
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
