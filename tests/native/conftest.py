"""Leaves the library as every test has found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def native_settings() -> Iterator[None]:
    """Leaves the library's thread count and instruction set as they were."""
    from sidestep import _native

    threads, simd = _native.num_threads(), _native.simd()
    yield
    _native.set_num_threads(threads)
    _native.set_simd(simd)
