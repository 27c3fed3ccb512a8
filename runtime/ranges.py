"""Ranges for profilers: NVTX in the domain `sidestep` for Nsight, or whoever else listens.

    step/3, step    one step of the stepwise driver, or the solver step of an engine's rows
    model           one model call
    tick            a model call and a step, or several of both, that may be one CUDA graph
    fine[0:8]       the fine solve of a block of SRDS, from its first step to its last
    correct         the parareal correction of the boundaries that can be formed
    decide          a criterion, or the stopping rule of SRDS

Where nobody listens a range is one look at a variable and makes no object.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

DOMAIN = "sidestep"


class Listener(Protocol):
    """Who hears of ranges, which may overlap."""

    def start(self, name: str) -> Any:
        """A range begins."""

    def end(self, started: Any) -> None:
        """What `start` returned ends."""


class _Nvtx:
    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def start(self, name: str) -> Any:
        return self._domain.start_range(self._domain.get_event_attributes(message=name))

    def end(self, started: Any) -> None:
        self._domain.end_range(started)


@functools.cache
def _nvtx() -> Listener | None:
    """None without the package `nvtx` or without a profiler.

    A profiler is there from the start of the process, so that one look is enough.
    """
    try:
        import nvtx
    except ImportError:
        return None
    domain = nvtx.get_domain(DOMAIN)
    return _Nvtx(domain) if isinstance(domain, nvtx.Domain) else None


_listener: Listener | None = None
_nothing: AbstractContextManager[None] = nullcontext()


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Within it all ranges of the process go to the listener, in place of NVTX."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def start(name: str) -> Any:
    """Begins a range that may end elsewhere in the program; None where nobody listens."""
    listener = _listener or _nvtx()
    return None if listener is None else (listener, listener.start(name))


def end(started: Any) -> None:
    """Ends what `start` returned."""
    if started is not None:
        listener, of_listener = started
        listener.end(of_listener)


def within(name: str) -> AbstractContextManager[None]:
    """A range around a block of code."""
    return _nothing if (_listener or _nvtx()) is None else _around(name)


@contextmanager
def _around(name: str) -> Iterator[None]:
    started = start(name)
    try:
        yield
    finally:
        end(started)
