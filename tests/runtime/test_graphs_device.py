"""What `CudaGraphs` asks of CUDA, in order, by a CUDA that only writes down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sidestep.runtime.graphs_device import CudaGraphs

GPU = torch.device("cuda", 1)


class Cuda:
    """Stands for `torch.cuda`: one current stream, and a log."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current: Any = self.Stream(name="current")
        self.pools = 0

    def Stream(self, device: Any = None, name: str = "side") -> Any:
        cuda = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                cuda.log.append(f"{name} waits for {other.name}")

        stream = Stream()
        stream.name = name  # type: ignore[attr-defined]
        return stream

    def CUDAGraph(self) -> Any:
        cuda = self

        class Graph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                cuda.pools += pool is None
                self.own = f"pool {cuda.pools}" if pool is None else pool
                cuda.log.append(f"begin in {self.own} on {cuda.current.name}")

            def capture_end(self) -> None:
                cuda.log.append(f"end on {cuda.current.name}")
                if "sync" in cuda.log[-2]:
                    raise RuntimeError("capture invalidated")

            def pool(self) -> str:
                return self.own

        return Graph()

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        assert device == GPU
        yield

    def current_stream(self, device: Any) -> Any:
        assert device == GPU
        return self.current

    def synchronize(self, device: Any = None) -> None:
        self.log.append("wait for the device")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda, zeros = Cuda(), torch.zeros
    for name in ("Stream", "CUDAGraph", "stream", "device", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))

    def end_pool(index: int, pool: str) -> None:
        cuda.log.append(f"allocate no more in {pool} of {index}")
        raise RuntimeError("not currently recording to it")

    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: cuda.log.append("no workspaces")
    )
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_pool)
    return cuda


KEEPER = [
    "no workspaces", "wait for the device", "begin in pool 1 on side", "end on side",
    "no workspaces",
]  # fmt: skip


def test_warm_up_and_capture(cuda: Cuda) -> None:
    graphs = CudaGraphs(GPU)
    assert cuda.log == KEEPER
    cuda.log.clear()

    def call() -> None:
        cuda.log.append(f"call on {cuda.current.name}, {torch.is_autocast_cache_enabled()}")

    graphs.warm_up(call)
    assert cuda.log == ["side waits for current", "call on side, False", "current waits for side"]
    cuda.log.clear()
    for _ in range(2):
        graph = graphs.capture(call)
        assert graph.pool() == "pool 1"
    assert cuda.log == [*KEEPER[:3], "call on side, False", *KEEPER[3:]] * 2
    assert cuda.current.name == "current" and torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_leaves_nothing_behind(cuda: Cuda, error: type[BaseException]) -> None:
    graphs = CudaGraphs(GPU)
    cuda.log.clear()

    def call() -> None:
        cuda.log.append("sync")
        raise error("the call's own")

    with pytest.raises(error, match="the call's own"):
        graphs.warm_up(call)
    assert cuda.log == ["side waits for current", "sync", "current waits for side"]
    cuda.log.clear()
    with pytest.raises(error, match="the call's own"):
        graphs.capture(call)
    another = [line.replace("pool 1", "pool 2") for line in KEEPER]
    ended = ["sync", "end on side", "allocate no more in pool 1 of 1", "no workspaces"]
    assert cuda.log == [*KEEPER[:3], *ended, *another]
    assert cuda.current.name == "current" and torch.is_autocast_cache_enabled()
    assert graphs.capture(lambda: None).pool() == "pool 2"
