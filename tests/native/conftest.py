"""An installed library for C programs, and the extension as every test has found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import capi
import pytest


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `cmake --install` has put libsidestep."""
    folder = capi.built("capi", "sidestep")
    to = tmp_path_factory.mktemp("installed")
    capi.run(capi.tool("cmake"), "--install", folder, "--prefix", to)
    return to


@pytest.fixture(autouse=True)
def native_settings() -> Iterator[None]:
    """Leaves the library's thread count and instruction set as they were."""
    from sidestep import _native

    threads, simd = _native.num_threads(), _native.simd()
    yield
    _native.set_num_threads(threads)
    _native.set_simd(simd)
