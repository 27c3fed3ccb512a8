"""What captures and replays: CUDA, behind a protocol that the tests fill with a recorder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """What has been captured."""

    def replay(self) -> None:
        """Does it once more, on the same tensors, in the order of the current stream."""


class GraphDevice(Protocol):
    """What captures: `CudaGraphs`, or a recorder in the tests."""

    def warm_up(self, call: Callable[[], None]) -> None:
        """Calls it for real where it would be captured, so that nothing is compiled in there."""

    def capture(self, call: Callable[[], None]) -> Graph:
        """Captures what it launches; nothing is done yet."""

    def synchronize(self) -> None:
        """Waits until no replay runs any more."""


class CudaGraphs:
    """CUDA graphs of one device, with one memory pool for all of them.

    They share it, so that one replay may overwrite what another has left behind, its outputs too:
    replay them one after another, and take what is needed out in between.
    """

    def __init__(self, device: torch.device) -> None:
        """Makes the stream that captures, and the pool."""
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
        self._keeper = self._begin_pool()

    def warm_up(self, call: Callable[[], None]) -> None:
        """On the stream that captures: some libraries keep a workspace for each stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), _without_cached_casts():
                call()
        finally:
            current.wait_stream(self._stream)

    def capture(self, call: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """See `GraphDevice`; other threads may go on using the device meanwhile."""
        try:
            return self._capture(call, self._keeper.pool())
        except BaseException:
            self._keeper = self._begin_pool()  # the old one still counts a capture
            raise

    def synchronize(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize(self._device)

    def _begin_pool(self) -> torch.cuda.CUDAGraph:
        """A graph with a pool of its own, which lasts as long as some graph uses it."""
        return self._capture(lambda: torch.zeros(1, device=self._device))

    def _capture(self, call: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
        """Not by `torch.cuda.graph`, which leaves the wrong stream behind when a capture fails."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), _own_workspaces():
            torch.cuda.synchronize()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                with _without_cached_casts():
                    call()
            except BaseException:
                with suppress(RuntimeError):  # it says that the capture is broken, which is known
                    graph.capture_end()
                if pool is not None:
                    _end_allocations(self._device, pool)
                raise
            graph.capture_end()
        return graph


def _end_allocations(device: torch.device, pool: Any) -> None:
    """What `capture_end` leaves out in many versions of torch if the capture is broken.

    The allocator would think of it as still going on, and could not wait for memory any more.
    """
    names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # 2.8, before it
    end = next(filter(None, (getattr(torch._C, name, None) for name in names)))
    with suppress(RuntimeError):  # newer versions have done it
        end(device.index, pool)


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS keeps a workspace for each stream, and others may have it let go of all of them.

    What is captured gets one in the graphs' pool, which nobody else is given.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Autocast forgets its casts of the weights when it ends, and a graph would still read them."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
