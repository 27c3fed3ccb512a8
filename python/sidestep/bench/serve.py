"""``sidestep bench serve``: pictures a second from one pipeline for many clients, three ways.

    one at a time     the plain pipeline, a request after another
    fixed batches     the plain pipeline, waiting requests of equal steps together; who comes while
                      a batch runs waits for its end
    service           `sidestep.serving.Service`: requests join and leave at every step

Each client sends its next request when it has the answer to the last.  The ways take turns, on the
same requests; a service with a method may be a fourth way.  After each round every picture of the
first three is compared with that of the first, and where one is off by more than 1 of 255 in any
value, nothing is reported.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image

from sidestep.errors import UserError
from sidestep.metrics import psnr
from sidestep.models import load_pipeline, load_prompts
from sidestep.report.environment import environment
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.serving import ImageRequest, Service
from sidestep.serving.request import ImageResult, Limits, Statistics

SERIAL, FIXED, SERVICE = "one at a time", "fixed batches", "service"
LAST_BIT = 1
"""Of 255: another batch size sums in another order, and a value may be rounded the other way."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        model: Bundled name or folder.
        clients: That ask at the same time.
        requests: Of all of them together.
        steps: Request i has ``steps[i % len(steps)]``.
        batch: Of the fixed batches, at most.
        capacity: Pictures in flight in the service.
        guidance: Scale.
        seed: Request i starts from ``seed + i``.
        repeats: Rounds; the median counts.
        adaptive: Whether the service is measured with `Adaptive` as well.
    """

    model: str = "emoji-sd"
    clients: int = 16
    requests: int = 64
    steps: tuple[int, ...] = (20, 30)
    batch: int = 8
    capacity: int = 16
    guidance: float = 7.5
    seed: int = 0
    repeats: int = 3
    adaptive: bool = True


class Server(Protocol):
    """What all ways have."""

    def submit(self, request: ImageRequest) -> Future[ImageResult]:
        """Queues a request."""


class Plain:
    """The plain pipeline behind a queue, in batches of equal steps."""

    def __init__(self, pipe: Any, batch: int) -> None:
        self._pipe, self._batch = pipe, batch
        self._waiting: deque[tuple[ImageRequest, Future[ImageResult]]] = deque()
        self._condition = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Plain:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    def submit(self, request: ImageRequest) -> Future[ImageResult]:
        """Queues a request."""
        future: Future[ImageResult] = Future()
        with self._condition:
            self._waiting.append((request, future))
            self._condition.notify()
        return future

    def _work(self) -> None:
        while batch := self._next():
            requests, futures = zip(*batch, strict=True)
            try:
                images = pictures(self._pipe, requests)
            except BaseException as error:
                for future in futures:
                    future.set_exception(error)
                continue
            steps = requests[0].steps
            cost = Statistics(
                steps=steps, model_calls=(float(steps),), ticks=steps, queued_seconds=0.0,
                running_seconds=0.0, method="none", solver="",
            )  # fmt: skip
            for image, future in zip(images, futures, strict=True):
                future.set_result(ImageResult([image], torch.empty(0), cost))

    def _next(self) -> list[tuple[ImageRequest, Future[ImageResult]]]:
        """The one that waits longest, and those that can go with it; empty at the end."""
        with self._condition:
            while not self._waiting and not self._closing:
                self._condition.wait()
            if not self._waiting:
                return []
            steps = self._waiting[0][0].steps
            chosen = [one for one in self._waiting if one[0].steps == steps][: self._batch]
            for one in chosen:
                self._waiting.remove(one)
            return chosen


def pictures(pipe: Any, requests: Sequence[ImageRequest]) -> list[Image]:
    """What the plain pipeline makes of requests of equal steps and guidance."""
    made: list[Image] = pipe(
        [request.prompt for request in requests],
        num_inference_steps=requests[0].steps,
        guidance_scale=requests[0].guidance,
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
    ).images
    return made


@dataclass
class Way:
    """One way to serve, and what it took.

    Attributes:
        name: In tables.
        serve: Makes the server.
        method: Of the requests.
        seconds: Of each round, from the first request to the last answer.
        latencies: Of every request.
        images: Of the last round, by request.
        calls: Model evaluations of each picture, likewise.
    """

    name: str
    serve: Callable[[], AbstractContextManager[Server]]
    method: str = "none"
    seconds: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)

    def round(self, requests: Sequence[ImageRequest], clients: int) -> None:
        """All requests once, from so many clients."""
        with self.serve() as server, ThreadPoolExecutor(clients) as pool:

            def ask(request: ImageRequest) -> tuple[ImageResult, float]:
                begin = time.perf_counter()
                result = server.submit(request).result()
                return result, time.perf_counter() - begin

            begin = time.perf_counter()
            answers = list(pool.map(ask, requests))
            self.seconds.append(time.perf_counter() - begin)
        self.latencies += [latency for _, latency in answers]
        self.images = [result.images[0] for result, _ in answers]
        self.calls = [result.statistics.model_calls[0] for result, _ in answers]


def run(settings: Settings) -> dict[str, Any]:
    """Measures all ways.

    Returns:
        The document.

    Raises:
        UserError: The model cannot be served.
        RuntimeError: Pictures differ; nothing is reported.
    """
    pipe = load_pipeline(settings.model)
    prompts = load_prompts("novel")
    asked = [
        ImageRequest(
            prompt=prompts[i % len(prompts)], seed=settings.seed + i,
            steps=settings.steps[i % len(settings.steps)], guidance=settings.guidance,
        )
        for i in range(settings.requests)
    ]  # fmt: skip

    def service() -> Service:
        limits = Limits(n=1, queue=max(settings.requests, settings.clients), steps=10_000)
        try:
            return Service(
                pipe, methods={"adaptive": Adaptive()}, limits=limits, capacity=settings.capacity
            )
        except ValueError as error:
            raise UserError(f"--model: {error}") from error

    ways = [
        Way(SERIAL, lambda: Plain(pipe, 1)),
        Way(FIXED, lambda: Plain(pipe, settings.batch)),
        Way(SERVICE, service),
    ]
    if settings.adaptive:
        ways.append(Way(f"{SERVICE}, adaptive", service, method="adaptive"))
    service().close()  # refuses what cannot be served
    pictures(pipe, asked[:1])
    for number in range(settings.repeats):
        for way in ways if number % 2 == 0 else reversed(ways):
            requests = [_with_method(request, way.method) for request in asked]
            way.round(requests, settings.clients)
        check(ways[:3])
    return _document(settings, ways)


def check(ways: Sequence[Way]) -> None:
    """Refuses to report where a picture is not that of the first way.

    Raises:
        RuntimeError: One is.
    """
    for way in ways[1:]:
        for i, (image, alone) in enumerate(zip(way.images, ways[0].images, strict=True)):
            apart = int(np.abs(_values(image) - _values(alone)).max() * 255 + 0.5)
            if apart > LAST_BIT:
                raise RuntimeError(
                    f"bench serve: {way.name}: picture {i} is up to {apart} of 255 away from the "
                    "plain pipeline's; no numbers reported"
                )


def _document(settings: Settings, ways: Sequence[Way]) -> dict[str, Any]:
    first, fixed = ways[:2]
    results = [
        {
            "way": way.name,
            "pictures_per_second": settings.requests / statistics.median(way.seconds),
            "seconds": way.seconds,
            "latency_median": statistics.median(way.latencies),
            "latency_p95": float(np.quantile(way.latencies, 0.95)),
            "nfe": statistics.mean(way.calls),
            "speedup": _ratio(first, way),
            "speedup_fixed": _ratio(fixed, way),
            "psnr": _quality(way.images, first.images),
        }
        for way in ways
    ]
    return {
        "command": "bench serve",
        "settings": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(settings).items()
        },
        "environment": environment(),
        "results": results,
    }


def _ratio(other: Way, way: Way) -> float:
    """How many times quicker: the median over rounds, each compared within itself."""
    rounds = zip(other.seconds, way.seconds, strict=True)
    return statistics.median(theirs / ours for theirs, ours in rounds)


def print_report(document: dict[str, Any]) -> None:
    """A table for people."""
    print(
        f"{'':20} {'pictures/s':>10} {'latency':>8} {'p95':>7} {'calls':>6} {'speed-up':>9} "
        f"{'to fixed':>9} {'PSNR':>6}"
    )
    for row in document["results"]:
        quality = "same" if row["psnr"] is None else f"{row['psnr']:.1f}"
        print(
            f"{row['way']:20} {row['pictures_per_second']:10.2f} {row['latency_median']:7.2f}s "
            f"{row['latency_p95']:6.2f}s {row['nfe']:6.1f} {row['speedup']:8.2f}x "
            f"{row['speedup_fixed']:8.2f}x {quality:>6}"
        )


def _with_method(request: ImageRequest, method: str) -> ImageRequest:
    return ImageRequest(**{**vars(request), "method": method})


def _values(image: Image) -> np.ndarray:  # [H, W, 3] in [0, 1]
    return np.asarray(image.convert("RGB")).astype(np.float64) / 255


def _quality(images: Sequence[Image], plain: Sequence[Image]) -> float | None:
    """Median PSNR to the plain pipeline's pictures; None where most are the same."""
    pairs = [(_values(a), _values(b)) for a, b in zip(images, plain, strict=True)]
    if all(np.abs(a - b).max() * 255 <= LAST_BIT + 0.5 for a, b in pairs):
        return None
    a, b = (torch.from_numpy(np.stack(each)).movedim(3, 1) for each in zip(*pairs, strict=True))
    median = statistics.median(psnr(a, b))
    return median if math.isfinite(median) else None
