"""The requests of one picture size: an engine, the loop around it, and who waits for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from sidestep.adapters.stages import Prepared, Stages
from sidestep.runtime.engine import Engine
from sidestep.runtime.engine_loop import EngineLoop
from sidestep.runtime.graphs import CaptureError
from sidestep.serving.request import ImageRequest, ImageResult

_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # of a captured model call


@dataclass(kw_only=True, eq=False)
class Order:
    """A request on its way.

    Attributes:
        request: What was asked.
        future: Whom it is for; cancelled at any time by whoever holds it.
        submitted: When, by the monotonic clock.
        started: When it came to the engine.
        prepared: What the pipeline made of it.
        number: The engine's.
    """

    request: ImageRequest
    future: Future[ImageResult]
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    prepared: Prepared | None = None
    number: int | None = None


class Lane:
    """One engine. The service's thread alone uses it, and changes `pending` and `running` under its
    lock.

    Attributes:
        engine: Of this size.
        pending: Orders that are not with the engine yet.
        running: Those that are, by the engine's number.
        ticks: Model calls so far.
    """

    def __init__(
        self,
        stages: Stages,
        first: Prepared,
        *,
        capacity: int,
        buckets: Sequence[int] | None,
        history: int,
        graphs: str,
    ) -> None:
        """Allocates the engine for requests like ``first``."""
        x, weights = first.request.x, first.request.guidance
        branches = max(2, len(weights[0]) if isinstance(weights[0], Sequence) else len(weights))
        most = branches * capacity
        if buckets is None and x.device.type == "cpu":
            buckets = range(1, most + 1)  # padding costs time and saves none
        elif buckets is None:
            buckets = [*(size for size in _SIZES if size < most), most]
        self.engine = Engine(
            x.shape[1:], capacity=capacity, buckets=buckets, dtype=first.dtype, device=x.device,
            registers=6, history=history, branches=branches,
        )  # fmt: skip
        self._stages = stages
        self._loop = self._make_loop(graphs)
        self.pending: deque[Order] = deque()
        self.running: dict[int, Order] = {}
        self.ticks = 0

    @property
    def rows(self) -> int:
        """Pictures in the engine."""
        return sum(order.request.n for order in self.running.values())

    def has_room(self, order: Order) -> bool:
        """Whether its rows can begin at once; a large one waits until it is alone."""
        return not self.running or self.rows + order.request.n <= self.engine.capacity

    def begin(self, order: Order) -> bool:
        """Gives a pending order, prepared, to the engine.

        Returns:
            False when it stays pending: the engine's table holds no more plans beside those of the
            orders that run.

        Raises:
            ValueError: It does not fit.
            RuntimeError: It does not fit, and the engine is empty.
        """
        assert order.prepared is not None
        try:
            order.number = self.engine.submit(order.prepared.request)
        except RuntimeError:
            if not self.running:
                raise
            return False
        order.started = time.monotonic()
        self.pending.remove(order)
        self.running[order.number] = order
        return True

    def leave(self, order: Order) -> None:
        """It is neither pending nor running any more."""
        if order.number is None:
            self.pending.remove(order)
        else:
            del self.running[order.number]

    def tick(self) -> bool:
        """One model call; False when nothing needs it.

        With CUDA graphs a model that cannot be captured goes on without.
        """
        try:
            called = self._loop.tick()
        except CaptureError:  # the tick was taken all the same
            self._loop, called = self._make_loop("off"), True
        self.ticks += called
        return called

    def _make_loop(self, graphs: str) -> EngineLoop:
        """A tick is one call: who comes meanwhile waits for no more."""
        return EngineLoop(self.engine, self._stages.call_model, graphs=graphs, chain=1)
