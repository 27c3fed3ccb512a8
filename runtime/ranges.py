"""NVTX ranges in the domain `sidestep`, for Nsight; nothing where no profiler listens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DOMAIN = "sidestep"


@functools.cache
def _domain() -> Any:
    """The domain, or None without the package `nvtx` or without a profiler.

    A profiler is there from the start of the process, so that one look is enough.
    """
    try:
        import nvtx
    except ImportError:
        return None
    domain = nvtx.get_domain(DOMAIN)
    return domain if isinstance(domain, nvtx.Domain) else None


def start(name: str) -> Any:
    """Begins a range that may end elsewhere in the program; None where nobody listens."""
    domain = _domain()
    return domain and domain.start_range(domain.get_event_attributes(message=name))


def end(started: Any) -> None:
    """Ends what `start` returned."""
    if started is not None:
        _domain().end_range(started)


@contextmanager
def within(name: str) -> Iterator[None]:
    """A range around a block of code."""
    started = start(name)
    try:
        yield
    finally:
        end(started)
