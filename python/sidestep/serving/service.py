"""A pipeline that many clients share: one thread, one turn after another.

    turn:   free the rows of cancelled requests
            prepare waiting requests, while there are rows for them       (texts, noise)
            and until one is refused: the others' call comes first
            one model call for rows of many requests, at many timesteps
            decode what is done and hand it over                          (pictures)

Everything that touches the pipeline happens in that thread, in that order: results do not depend on
who else was there, but for the last bits of a model whose kernels depend on the batch.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from sidestep.adapters.stages import Stages
from sidestep.runtime.engine import Result
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criterion import Method
from sidestep.runtime.methods.srds import SRDS
from sidestep.serving.lane import Lane, Order
from sidestep.serving.request import (
    BadRequest,
    ImageRequest,
    ImageResult,
    Limits,
    Overloaded,
    ServiceClosed,
    ServiceDead,
    Statistics,
)

State = Literal["ok", "draining", "closed", "dead"]
_WARM_UP = {"prompt": ["a picture"], "num_inference_steps": 2, "guidance_scale": 7.5}


class Service:
    """Makes pictures for any number of clients, in any thread.

    Attributes:
        pipe: The pipeline. It belongs to the service until `close`.
        limits: What a client may ask for.
        methods: Settings by name.
        solvers: Schedulers by name.
        sizes: ``(width, height)`` of pictures.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        methods: Mapping[str, Method | SRDS | None] | None = None,
        solvers: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        capacity: int = 32,
        buckets: Sequence[int] | None = None,
        graphs: str = "auto",
    ) -> None:
        """Calls the model once for each size, to see what it returns, and starts the thread.

        Args:
            pipe: A text-to-image pipeline of diffusers that the whole-trajectory driver can take.
            sizes: ``(width, height)`` of pictures, the first is the default; None for the
                pipeline's own.
            methods: What requests may choose by name, beside ``"none"``; None for ``"adaptive"``
                and ``"srds"`` with their default settings.
            solvers: Schedulers that requests may choose by name.
            limits: What a client may ask for; None for the defaults, with n up to capacity.
            capacity: Rows of each size at once.
            buckets: Sizes of a model call in entries, as of `Engine`.
            graphs: As of `EngineLoop`; what cannot be captured runs without.

        Raises:
            ValueError: The pipeline cannot be served so; one sentence says why.
        """
        if methods is None:
            methods = {"adaptive": Adaptive(), "srds": SRDS()}
        limits = limits or Limits(n=max(1, min(Limits().n, capacity)))
        if limits.n > capacity:
            raise ValueError(
                f"Service: limits allow {limits.n} pictures in a request, expected at most "
                f"capacity, {capacity}"
            )
        self.pipe, self.limits = pipe, limits
        self.methods = {"none": None, **methods}
        self.solvers = dict(solvers or {})
        self._stages = Stages(pipe)
        self._condition = threading.Condition()
        self._closing = self._drains = False
        self._error: BaseException | None = None
        self._totals = dict.fromkeys(
            ("submitted", "refused", "done", "failed", "cancelled", "pictures"), 0
        )
        self._evaluations, self._saved = 0.0, 0.0
        self._lanes: dict[tuple[int, int], Lane] = {}
        try:
            for method in self.methods.values():
                self._stages.check_method(method)
            history = max(3, *map(_history, self.methods.values()))
            for size in sizes or (None,):
                self._open_lane(size, capacity, buckets, history, graphs)
        except BaseException:
            self._stages.close()
            raise
        self.sizes = tuple(self._lanes)
        self._default = self.sizes[0] if sizes else None
        self._thread = threading.Thread(target=self._work, name="sidestep-service", daemon=True)
        self._thread.start()

    # -- for clients, in any thread ---------------------------------------------------------------

    def submit(self, request: ImageRequest) -> Future[ImageResult]:
        """Queues a request.

        Returns:
            Its future. ``cancel()`` works until it is done, and frees its rows before the next
            model call; what goes wrong is its exception.

        Raises:
            BadRequest: It is beyond the limits, or there is no such method, solver or size.
            Overloaded: Too many wait.
            ServiceClosed: The service takes no more.
            ServiceDead: It cannot.
        """
        with self._condition:
            try:
                self.limits.check(request, self.sizes, self.methods, self.solvers)
                self._expect_open()
            except Exception:
                self._totals["refused"] += 1
                raise
            if request.size is None and self._default is not None:
                request = replace(request, size=self._default)
            order = Order(request=request, future=Future())
            self._lanes[request.size or self.sizes[0]].pending.append(order)
            self._totals["submitted"] += 1
            self._condition.notify_all()
        return order.future

    async def generate(self, request: ImageRequest) -> ImageResult:
        """`submit` and wait, for coroutines: cancelling the task cancels the request.

        Raises:
            BadRequest: And all else that `submit` raises, or that the request failed with.
        """
        return await asyncio.wrap_future(self.submit(request))

    @property
    def state(self) -> State:
        """``"ok"``; ``"draining"``, no new requests; ``"closed"``; or ``"dead"``: see `error`."""
        if self._error is not None:
            return "dead"
        if not self._thread.is_alive():
            return "closed"
        return "draining" if self._closing else "ok"

    @property
    def error(self) -> BaseException | None:
        """What the thread has died of."""
        return self._error

    def counts(self) -> dict[str, float]:
        """What there is and what there was.

        Requests ``waiting`` and ``running`` now; ``submitted``, ``refused``, ``done``, ``failed``
        and ``cancelled`` so far; ``pictures`` made; evaluations of the model ``evaluated`` for
        these and ``saved``; calls of the model (``ticks``).
        """
        with self._condition:
            lanes = self._lanes.values()
            return {
                "waiting": sum(len(lane.pending) for lane in lanes),
                "running": sum(len(lane.running) for lane in lanes),
                **self._totals,
                "evaluated": self._evaluations,
                "saved": self._saved,
                "ticks": sum(lane.ticks for lane in lanes),
            }

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Takes no more requests, ends, and leaves the pipeline as it was.

        Args:
            drain: Whether what was submitted is finished before; else it fails at once, and so it
                does where an earlier `close` said so.
            timeout: Seconds to wait for the end; None for as long as it takes.

        Returns:
            Whether it has ended; in a callback of a future, which the service's thread runs, it has
            not, and this does not wait.
        """
        with self._condition:
            self._drains = drain and (self._drains or not self._closing)
            self._closing = True
            self._condition.notify_all()
        if threading.current_thread() is self._thread:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the thread -------------------------------------------------------------------------------

    def _work(self) -> None:
        error: Exception = ServiceClosed("the service was closed before the pictures were done")
        try:
            while self._wait():
                self._turn()
        except BaseException as reason:
            self._error = reason
            error = ServiceDead(f"the service has died: {reason!r}")
            error.__cause__ = reason
        finally:
            with self._condition:
                self._closing = True
            self._abandon(error)
            self._stages.close()

    def _wait(self) -> bool:
        """Until there is something to do; False when there will be nothing any more."""
        with self._condition:
            while True:
                busy = any(lane.pending or lane.running for lane in self._lanes.values())
                if self._closing and not (self._drains and busy):
                    return False
                if busy:
                    return True
                self._condition.wait()

    def _turn(self) -> None:
        for lane in self._lanes.values():
            self._forget_cancelled(lane)
            while (order := self._next(lane)) is not None and self._begin(lane, order):
                pass
            self._forget_cancelled(lane)  # meanwhile
            lane.tick()
            for result in lane.engine.results():
                self._end(lane, lane.running[result.id], result)

    def _forget_cancelled(self, lane: Lane) -> None:
        """Those whose clients have gone: their rows are free, or were never needed."""
        for number, order in lane.running.items():
            if order.future.cancelled():
                lane.engine.cancel(number)
        with self._condition:
            gone = [order for order in lane.pending if order.future.cancelled()]
        for order in gone:
            self._settle(lane, order, None)

    def _next(self, lane: Lane) -> Order | None:
        """The next order, if its rows can begin."""
        with self._condition:
            return lane.pending[0] if lane.pending and lane.has_room(lane.pending[0]) else None

    def _begin(self, lane: Lane, order: Order) -> bool:
        """Prepares an order for the engine; False when it has not come there."""
        request = order.request
        try:
            if order.prepared is None:
                order.prepared = self._stages.prepare(
                    _arguments(request),
                    range(request.seed, request.seed + request.n),
                    method=self.methods[request.method],
                    scheduler=self.solvers.get(request.solver or ""),
                )
            with self._condition:
                return lane.begin(order)
        except ValueError as error:
            refused = BadRequest(str(error).removeprefix("enable: "))
            refused.__cause__ = error
            self._settle(lane, order, refused)
        except Exception as error:
            self._settle(lane, order, error)
        return False

    def _end(self, lane: Lane, order: Order, result: Result) -> None:
        """The engine has let go of an order."""
        if order.future.cancelled():
            return self._settle(lane, order, None)
        if result.error is not None:
            return self._settle(lane, order, result.error)
        assert order.prepared is not None and result.x is not None
        try:
            images = self._stages.decode(order.prepared, result.x)
        except Exception as error:
            return self._settle(lane, order, error)
        plan = order.prepared.request.plan
        statistics = Statistics(
            steps=len(plan), model_calls=result.nfe, ticks=result.ticks,
            queued_seconds=order.started - order.submitted,
            running_seconds=time.monotonic() - order.started,
            method=order.request.method, solver=plan.name,
        )  # fmt: skip
        self._settle(lane, order, ImageResult(images, result.x, statistics))

    def _settle(self, lane: Lane, order: Order, outcome: ImageResult | Exception | None) -> None:
        """An order is counted out, and then its client is told, unless it has gone."""
        with self._condition:
            lane.leave(order)
            wanted = order.future.set_running_or_notify_cancel()
            self._count(outcome if wanted else None)
        if not wanted:
            return
        if isinstance(outcome, ImageResult):
            order.future.set_result(outcome)
        else:
            order.future.set_exception(outcome)

    def _count(self, outcome: ImageResult | Exception | None) -> None:
        if outcome is None:
            self._totals["cancelled"] += 1
        elif isinstance(outcome, Exception):
            self._totals["failed"] += 1
        else:
            self._totals["done"] += 1
            self._totals["pictures"] += len(outcome.images)
            self._evaluations += sum(outcome.statistics.model_calls)
            self._saved += sum(outcome.statistics.saved_calls)

    def _abandon(self, error: Exception) -> None:
        """Nothing is made any more."""
        with self._condition:
            orders = [
                (lane, order)
                for lane in self._lanes.values()
                for order in (*lane.running.values(), *lane.pending)
            ]
        for lane, order in orders:
            with suppress(BaseException):  # of a callback: others are told all the same
                self._settle(lane, order, error)

    # -- settings ---------------------------------------------------------------------------------

    def _expect_open(self) -> None:
        if self._error is not None:
            raise ServiceDead(f"the service has died: {self._error!r}")
        if self._closing:
            raise ServiceClosed("the service takes no requests any more")
        lanes = self._lanes.values()
        there = sum(len(lane.pending) + len(lane.running) for lane in lanes)
        if there >= self.limits.queue:
            raise Overloaded(f"{there} requests wait or run, expected less than {there}")

    def _open_lane(
        self,
        size: tuple[int, int] | None,
        capacity: int,
        buckets: Sequence[int] | None,
        history: int,
        graphs: str,
    ) -> None:
        given = {**_WARM_UP, **_sized(size)}
        first = self._stages.prepare(given, [0])
        made = self._stages.decode(first, first.request.x)[0].size
        if size is not None and made != tuple(size):
            raise ValueError(
                f"Service: asked for {size[0]}x{size[1]} the pipeline makes {made[0]}x{made[1]}"
            )
        self._lanes[made] = Lane(
            self._stages, first, capacity=capacity, buckets=buckets, history=history, graphs=graphs
        )


def _history(method: Method | SRDS | None) -> int:
    """Outputs that a method looks back on."""
    return 0 if method is None or isinstance(method, SRDS) else method.criterion().history


def _sized(size: tuple[int, int] | None) -> dict[str, int]:
    return {} if size is None else {"width": size[0], "height": size[1]}


def _arguments(request: ImageRequest) -> dict[str, Any]:
    """Of the pipeline's call."""
    given: dict[str, Any] = {
        "prompt": [request.prompt] * request.n,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        **_sized(request.size),
    }
    if request.negative_prompt is not None:
        given["negative_prompt"] = [request.negative_prompt] * request.n
    return given
