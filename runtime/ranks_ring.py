"""A run's traffic between the ranks that share the blocks of SRDS: a ring, each talks to the next.

Block i is with the rank at place (i - 1) mod P, so that a boundary always goes one place on.  All
else goes the same way, from place to place by a thread that listens, whatever the model is doing.

    A link carries one closing word in a run, after which nothing comes: the STOP of the last image,
    or FAILED.  A rank is done with a run when it has got that word, and passed it on.

So every send has its receive when a run ends, however it ends, and the next run may follow at once.
A rank that dies closes its links, which the next one notices and tells the others.  One that hangs
is given away by its silence: all others say ALIVE when they have nothing else to say.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sidestep.runtime.ranks_links import (
    Kind,
    Link,
    RankError,
    Word,
    cut,
    differ,
    silent,
    unreachable,
)

Item = tuple[Word, Tensor | None]
"""A word and the numbers that belong to it."""

_PENDING = 64  # sends that need not have been taken

_OF_AN_IMAGE = (Kind.STATE, Kind.KEPT, Kind.RESIDUALS, Kind.STOP)


@dataclass(frozen=True)
class Ring:
    """The ranks that share the blocks.

    Attributes:
        rank: This one's number in the job.
        place: And in the ring.
        size: P.
        before: The link from the place before; None in a ring of one.
        after: The link to the next place.
        timeout: Seconds of silence after which a rank has failed.
    """

    rank: int
    place: int
    size: int
    before: Link | None
    after: Link | None
    timeout: float


class Traffic:
    """What goes over the ring in one run.

    Attributes:
        failure: The sentence with which the run has failed, None unless it has.
    """

    def __init__(self, ring: Ring, images: int, last: int, greeting: str) -> None:
        """Begins to listen.

        Args:
            ring: The ranks.
            images: Of the run.
            last: The place that has the last block, where residuals go.
            greeting: What run it is; all ranks must mean the same.
        """
        self._ring, self._last, self._greeting = ring, last, cut(greeting)
        self._going = set(range(images))  # images that this rank has passed no STOP of
        self._closed = False
        self.failure: str | None = None
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        if ring.before is not None:
            self._thread = threading.Thread(
                target=self._listen, args=(ring.before, images), daemon=True
            )
            self._thread.start()
            if ring.place == 0:
                self.send(Word(Kind.GREETING, text=self._greeting))

    def send(
        self,
        word: Word,
        numbers: Tensor | None = None,  # [word.size] fp32
    ) -> None:
        """To the next place, unless the image that it is about has its result."""
        with self._lock:
            if self._closed or (word.kind in _OF_AN_IMAGE and word.image not in self._going):
                return
            if word.kind is Kind.STOP:
                self._going.discard(word.image)
                self._closed = not self._going
            self._send(word, numbers)

    def receive(self, wait: bool, meanwhile: Callable[[], None]) -> list[Item]:
        """What has come for this rank since the last call.

        Args:
            wait: Whether to wait for it, if it is nothing.
            meanwhile: Is called now and then.

        Raises:
            RankError: The run has failed.
        """
        items: list[Item] = []
        while True:
            meanwhile()
            self.keep_alive()
            try:
                patience = self._ring.timeout / 8
                blocks = wait and not items
                items.append(self._inbox.get(block=blocks, timeout=patience if blocks else None))
            except queue.Empty:
                if items or not wait:
                    break
        for word, numbers in items:
            if word.kind is Kind.FAILED:
                raise RankError(word.text)
            if numbers is not None and numbers.is_cuda:  # it was received on another stream
                numbers.record_stream(torch.cuda.current_stream())
        return items

    def rest(self) -> list[Item]:
        """What has come up to the closing word."""
        if self._thread is not None:
            self._thread.join()
        return self.receive(False, lambda: None)

    def keep_alive(self) -> None:
        """Lets the next rank know that this one is, if nothing else has of late."""
        after = self._ring.after
        if after is not None and time.monotonic() - after.sent > self._ring.timeout / 8:
            self.send(Word(Kind.ALIVE))

    def settle(self) -> None:
        """Waits for the next rank to take in what was sent long ago."""
        if self._ring.after is not None:
            try:
                self._ring.after.flush(leave=_PENDING)
            except RuntimeError as error:
                with self._lock:
                    self._lose(self._ring.after, error)

    def fail(self, sentence: str) -> None:
        """Tells all ranks why the run has failed; too late where all images have their results."""
        with self._lock:
            if not self._closed and self._going:
                self._closed, self.failure = True, cut(sentence)
                self._send(Word(Kind.FAILED, origin=self._ring.place, text=self.failure), None)

    def end(self) -> None:
        """Waits until nothing more comes, and all that was sent has been taken.

        Raises:
            RankError: The next rank is gone without the results.
        """
        if self._thread is not None:
            self._thread.join()
        if self._ring.after is not None:
            try:
                self._ring.after.flush()
            except RuntimeError as error:
                decided = self.failure is None
                with self._lock:
                    self._lose(self._ring.after, error)
                if decided:
                    raise RankError(self.failure) from error

    def _send(self, word: Word, numbers: Tensor | None) -> None:
        """Sends under the lock; a rank that is gone is no more to be told anything."""
        after = self._ring.after
        if after is None:
            return
        try:
            after.send(word, numbers)
        except RuntimeError as error:
            self._lose(after, error)

    def _lose(self, after: Link, error: RuntimeError) -> None:
        after.drop()
        if self.failure is None:
            self.failure = cut(unreachable(self._ring.rank, after.peer, error))
        self._closed = True
        self._inbox.put((Word(Kind.FAILED, text=self.failure), None))

    def _listen(self, before: Link, left: int) -> None:
        """Takes words until the closing one; in a thread of its own."""
        ring = self._ring
        stream = torch.cuda.Stream(before.device) if before.device.type == "cuda" else None
        try:
            with torch.cuda.stream(stream):
                while left:
                    word, numbers = before.receive()
                    if stream is not None:
                        stream.synchronize()  # numbers are used on other streams
                    if word.kind is Kind.FAILED:
                        self.fail(word.text)
                        self._inbox.put((word, None))
                        return
                    left -= word.kind is Kind.STOP
                    self._take(word, numbers)
        except Exception as error:
            why = silent(ring.rank, before.peer, "its states and results", error)
            self.fail(why)
            self._inbox.put((Word(Kind.FAILED, text=cut(why)), None))

    def _take(self, word: Word, numbers: Tensor | None) -> None:
        """For this rank, for the next one, or for both."""
        ring = self._ring
        back = (ring.place + 1) % ring.size == word.origin  # who knows it already
        if word.kind is Kind.GREETING and word.text == self._greeting:
            if not back:
                self.send(word)
        elif word.kind is Kind.GREETING:
            self.fail(differ(ring.rank, self._greeting, word.text))
            self._inbox.put((Word(Kind.FAILED, text=self.failure or ""), None))
        elif word.kind is Kind.STOP and word.origin != ring.place:
            self.send(replace(word, size=0) if back else word, None if back else numbers)
            self._inbox.put((word, numbers))
        elif word.kind is Kind.RESIDUALS and ring.place != self._last:
            self.send(word, numbers)
        elif word.kind in (Kind.STATE, Kind.KEPT, Kind.RESIDUALS):
            self._inbox.put((word, numbers))
