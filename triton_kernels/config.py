"""The one place of this layer that reads the environment.

``SIDESTEP_KERNELS`` picks the backend of every operator: ``auto`` (the default: native C++ on the
CPU, Triton on CUDA), ``native``, ``triton`` or ``reference``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "native", "triton", "reference")

_chosen: str | None = None


def backend() -> str:
    """Returns the chosen backend; the environment is read on the first call.

    Raises:
        ValueError: `SIDESTEP_KERNELS` names no backend.
    """
    global _chosen
    if _chosen is None:
        _chosen = _known(os.environ.get("SIDESTEP_KERNELS") or "auto")
    return _chosen


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the body with another backend (process-wide: meant for tests and benchmarks).

    Args:
        name: One of `BACKENDS`.

    Raises:
        ValueError: `name` is no backend.
    """
    global _chosen
    previous = backend()
    _chosen = _known(name)
    try:
        yield
    finally:
        _chosen = previous


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"SIDESTEP_KERNELS is {name!r}, expected one of {', '.join(BACKENDS)}")
    return name
