"""Makes the helper file importable by its stem; `tests` itself must stay off sys.path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HELPER = Path(__file__).resolve().parent / "native_problems.py"
spec = importlib.util.spec_from_file_location(HELPER.stem, HELPER)
assert spec is not None and spec.loader is not None
module = sys.modules[HELPER.stem] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


@pytest.fixture(autouse=True)
def native_settings() -> Iterator[None]:
    """Leaves the library's thread count and instruction set as they were."""
    from sidestep import _native

    threads, simd = _native.num_threads(), _native.simd()
    yield
    _native.set_num_threads(threads)
    _native.set_simd(simd)
