"""What the ranks of a job send each other: words of fixed size, some of them with numbers.

A link is one direction between two ranks; what is sent over it arrives in that order.  Words always
travel through the CPU by gloo, so that whoever gets one need not ask the device what it says; the
numbers that belong to a word (a state, a result) follow by NCCL where both ends have it, else by
gloo as well.
"""

from __future__ import annotations

import enum
import itertools
import re
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_HEAD = struct.Struct("<7qd")
_BYTES = 1024
_WORDS, _NUMBERS = 0, 1  # tags
_BETWEEN = "; "  # the parts of a greeting


def cut(text: str) -> str:
    """As much of a text as a word has room for."""
    return text.encode()[: _BYTES - _HEAD.size].decode(errors="ignore")


def unreachable(rank: int, peer: int, error: Exception) -> str:
    """That a rank could not send to another one."""
    return f"rank {rank} cannot reach rank {peer}: {_reason(error)}"


def silent(rank: int, peer: int, wanted: str, error: Exception) -> str:
    """That a rank got nothing from another one."""
    return (
        f"rank {rank} got no word from rank {peer} while it waited for {wanted}: {_reason(error)}"
    )


def _reason(error: Exception) -> str:
    """What an error of a connection says, without where in gloo and its advice."""
    said = re.sub(r"^\[\S+\] ", "", str(error)).split(" This is typically")[0]
    return said.strip().rstrip(".")


def greeting_of(*parts: str) -> str:
    """What run it is, so that `differ` can tell in which part two ranks differ."""
    return _BETWEEN.join(parts)


def differ(rank: int, own: str, told: str) -> str:
    """That a rank has been asked for another run than the first one, and what is other about it."""
    mine, others = cut(own).split(_BETWEEN), cut(told).split(_BETWEEN)
    pairs = itertools.zip_longest(mine, others, fillvalue="nothing more")
    given, expected = zip(*(pair for pair in pairs if pair[0] != pair[1]), strict=True)
    return (
        f"rank {rank} was given {', '.join(given)}, expected the same as the rank before: "
        f"{', '.join(expected)}"
    )


class RankError(RuntimeError):
    """A run over several ranks has failed; every rank raises it, with the same sentence."""


class Kind(enum.IntEnum):
    """What a word says.

    GREETING: what run it is. STATE: a boundary. KEPT: one that has hardly moved, so that the block
    after it need not start again. RESIDUALS: how boundaries have changed. STOP: an image has its
    result. FAILED: the run has not. ALIVE: nothing, but in time. CALL and OUTPUT: of
    the model, for one guidance branch.
    """

    GREETING = 0
    STATE = 1
    RESIDUALS = 2
    STOP = 3
    FAILED = 4
    ALIVE = 5
    CALL = 6
    OUTPUT = 7
    KEPT = 8


@dataclass(frozen=True)
class Word:
    """One word.

    Attributes:
        kind: What it says.
        image: Of the request.
        block: Of a boundary, counted from 1.
        iterate: Of a boundary or a result.
        origin: The place of the rank that said it first.
        size: fp32 numbers that follow.
        value: The estimated error of a result.
        text: Why it failed, or what run it is.
    """

    kind: Kind
    image: int = 0
    block: int = 0
    iterate: int = 0
    origin: int = 0
    size: int = 0
    value: float = 0.0
    text: str = ""

    def pack(self) -> Tensor:  # [_BYTES] uint8
        """As bytes."""
        text = cut(self.text).encode()
        numbers = (self.kind, self.image, self.block, self.iterate, self.origin, self.size)
        head = _HEAD.pack(*numbers, len(text), self.value)
        return torch.frombuffer(bytearray((head + text).ljust(_BYTES, b"\0")), dtype=torch.uint8)

    @staticmethod
    def unpack(
        packed: Tensor,  # [_BYTES] uint8
    ) -> Word:
        """What `pack` has packed."""
        data = packed.numpy().tobytes()
        kind, image, block, iterate, origin, size, length, value = _HEAD.unpack_from(data)
        text = data[_HEAD.size : _HEAD.size + length].decode(errors="ignore")
        return Word(Kind(kind), image, block, iterate, origin, size, value, text)


@dataclass(frozen=True)
class Wire:
    """What carries words and numbers between two ranks.

    Attributes:
        words: A group of the two with gloo.
        numbers: One with NCCL; None to take ``words`` for them too.
        device: Of the numbers at both ends.
    """

    words: dist.ProcessGroup
    numbers: dist.ProcessGroup | None
    device: torch.device


class Link:
    """One direction between this rank and another one. Sends may come from several threads.

    Attributes:
        peer: The other's rank in the default group.
        sent: When the last word has been sent.
    """

    def __init__(self, peer: int, wire: Wire, timeout: float) -> None:
        """A link that nothing has been sent over.

        Args:
            peer: Rank in the default group.
            wire: What carries it.
            timeout: Seconds until something that is waited for has failed.
        """
        self.peer, self.sent = peer, time.monotonic()
        self._wire, self._timeout = wire, timedelta(seconds=timeout)
        self._pending: deque[tuple[dist.Work, bool, Tensor]] = deque()  # it lives until it has left
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Of the numbers."""
        return self._wire.device

    def send(
        self,
        word: Word,
        numbers: Tensor | None = None,  # [word.size] fp32
    ) -> None:
        """Sends a word without waiting for it to be taken; the numbers must not change any more.

        Raises:
            RuntimeError: The other end is gone.
        """
        with self._lock:
            self._post(word.pack(), None, _WORDS)
            if numbers is not None:
                assert numbers.numel() == word.size and numbers.dtype is torch.float32
                near = numbers.cpu() if self._wire.numbers is None else numbers
                self._post(near.contiguous(), self._wire.numbers, _NUMBERS)
            self.sent = time.monotonic()

    def flush(self, leave: int = 0) -> None:
        """Waits until what was sent has been taken; for one thread only.

        Args:
            leave: But for so many sends, the last ones.

        Raises:
            RuntimeError: The other end is gone, or does not take it.
        """
        while len(self._pending) > leave:
            self._wait(*self._pending.popleft()[:2])

    def drop(self) -> None:
        """Gives up what has not left, because the other end is gone."""
        self._pending.clear()

    def receive(self) -> tuple[Word, Tensor | None]:
        """Waits for the next word, and for the numbers that belong to it.

        Raises:
            RuntimeError: The other end is gone, or nothing came in time.
        """
        packed = torch.empty(_BYTES, dtype=torch.uint8)
        self._wait(dist.irecv(packed, self.peer, group=self._wire.words, tag=_WORDS), False)
        word = Word.unpack(packed)
        if not word.size:
            return word, None
        nccl = self._wire.numbers
        place = "cpu" if nccl is None else self._wire.device
        numbers = torch.empty(word.size, dtype=torch.float32, device=place)
        group = self._wire.words if nccl is None else nccl
        self._wait(dist.irecv(numbers, self.peer, group=group, tag=_NUMBERS), nccl is not None)
        return word, numbers.to(self._wire.device)

    def _post(self, tensor: Tensor, nccl: dist.ProcessGroup | None, tag: int) -> None:
        group = self._wire.words if nccl is None else nccl
        work = dist.isend(tensor, self.peer, group=group, tag=tag)
        assert work is not None  # both are in the group
        self._pending.append((work, nccl is not None, tensor))

    def _wait(self, work: dist.Work | None, nccl: bool) -> None:
        """A wait for NCCL lets the host go on at once; gloo knows only after one."""
        assert work is not None  # both are in the group
        if not nccl:
            work.wait(self._timeout)
            return
        limit = time.monotonic() + self._timeout.total_seconds()
        while not work.is_completed():
            if time.monotonic() > limit:
                raise RuntimeError(f"timed out after {self._timeout.total_seconds():g} s")
            time.sleep(5e-5)
        work.wait()  # raises what went wrong
