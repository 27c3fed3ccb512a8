"""The model calls of a rank, and guidance branches that other ranks evaluate for it.

In a team of G ranks each evaluates one branch of every call: the leader, of branch 0, runs the
sampler and sends the others what they are to evaluate.  There is nothing to iterate about it, and
the outputs are the same bits as in one call, where the model's do not depend on the batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.runtime import ranges
from sidestep.runtime.engine_check import check_output
from sidestep.runtime.engine_conditioning import gather
from sidestep.runtime.engine_request import Batch
from sidestep.runtime.engine_rows import Live
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
from sidestep.runtime.upload import upload

Model = Callable[[Batch], Tensor]
"""Of a batch, the output of each of its entries, as for the engine."""


@dataclass(frozen=True)
class Lines:
    """What a call is about.

    Attributes:
        x: ``[n, *shape]`` model dtype, scaled as the model expects it.
        t: ``[n]`` fp32, the model's own time.
        rows: ``[n]`` images.
        steps: ``[n]`` of the plan.
    """

    x: Tensor
    t: Tensor
    rows: Sequence[int]
    steps: Sequence[int]

    def pack(self) -> Tensor:  # [n * (D + 3)] fp32
        """All of it in one tensor; no number of it is rounded."""
        counted = upload([*self.rows, *self.steps], torch.float32, self.t.device)
        return torch.cat([self.x.float().flatten(), self.t, counted])

    @staticmethod
    def unpack(
        packed: Tensor,  # [n * (D + 3)] fp32
        count: int,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Lines:
        """What `pack` has packed of ``count`` lines."""
        x, t, counted = packed.tensor_split([len(packed) - 3 * count, len(packed) - 2 * count])
        numbers = [int(number) for number in counted.tolist()]
        return Lines(x.to(dtype).view(count, *shape), t, numbers[:count], numbers[count:])


class Calls:
    """Calls the model for some branches of the rows of a request.

    Attributes:
        branches: What this rank evaluates.
        made: Calls so far.
    """

    def __init__(
        self, live: Live, model: Model, branches: Sequence[int], sizes: Sequence[int] | None
    ) -> None:
        """For one run.

        Args:
            live: The request.
            model: Of a batch, its output.
            branches: What this rank evaluates.
            sizes: Entries of a call, ascending: a smaller one is filled up with copies of its first
                entry. None for any number.
        """
        self._live, self._model, self._sizes = live, model, sizes
        self.branches, self.made = tuple(branches), 0

    @property
    def most(self) -> int:
        """Rows in a call, at most; 0 for any number."""
        return self._sizes[-1] // len(self.branches) if self._sizes is not None else 0

    def __call__(self, lines: Lines) -> list[Tensor]:  # of [n, D], a tensor for each branch
        """One call.

        Raises:
            ValueError: The output has a wrong shape or device.
            TypeError: It has a wrong dtype.
        """
        count, live, x = len(lines.rows), self._live, lines.x
        size = count * len(self.branches)
        total = size if self._sizes is None else next(s for s in self._sizes if s >= size)
        entries = [(i, g) for g in self.branches for i in range(count)]
        entries += [(0, self.branches[0])] * (total - size)
        index = upload([i for i, _ in entries], torch.int64, x.device)
        batch = Batch(
            engine=-1,
            ticket=self.made,
            size=size,
            x=x[index],
            t=lines.t[index],
            conditioning=gather(
                [(live.conditioning, g * live.count + lines.rows[i]) for i, g in entries]
            ),
            requests=(0,) * total,
            rows=tuple(lines.rows[i] for i, _ in entries),
            branches=tuple(g for _, g in entries),
            steps=tuple(lines.steps[i] for i, _ in entries),
        )
        with ranges.within("model"):
            output = self._model(batch)
        check_output(output, total, x.shape[1:], x.dtype, x.device)
        for row in lines.rows:
            live.count_call(row, self.made)
        self.made += 1
        return list(output.detach()[:size].reshape(len(self.branches), count, -1).unbind(0))


@dataclass(frozen=True)
class Helper:
    """The links of a leader to and from a rank that evaluates a branch for it."""

    to: Link
    back: Link


class Team:
    """What a leader says to those who evaluate the other branches for it."""

    def __init__(self, helpers: Sequence[Helper], rank: int, timeout: float) -> None:
        """Has said nothing yet.

        Args:
            helpers: Of branch 1 and on.
            rank: The leader.
            timeout: Seconds of silence after which a rank has failed.
        """
        self._helpers, self._rank, self._timeout = helpers, rank, timeout

    def greet(self, greeting: str) -> None:
        """Tells them what run begins.

        Raises:
            RankError: One of them is gone.
        """
        for helper in self._helpers:
            self._say(helper, Word(Kind.GREETING, text=greeting))

    def evaluate(self, calls: Calls, lines: Lines) -> list[Tensor]:  # G of [n, D]
        """All branches: the leader's own and theirs.

        Raises:
            RankError: One of them has failed.
        """
        if not self._helpers:
            return calls(lines)
        packed, outputs = lines.pack(), []
        for helper in self._helpers:
            self._say(helper, Word(Kind.CALL, block=len(lines.rows), size=len(packed)), packed)
        try:
            outputs = calls(lines)
        finally:  # each call has its answer, whatever happens
            answers = [self._answer(helper) for helper in self._helpers]
        for word, output in answers:
            if output is None:
                raise RankError(word.text)
            outputs.append(output.view(outputs[0].shape).to(outputs[0].dtype))
        return outputs

    def _say(self, helper: Helper, word: Word, numbers: Tensor | None = None) -> None:
        try:
            helper.to.flush(leave=2)  # all but the last call has been taken long ago
            helper.to.send(word, numbers)
        except RuntimeError as error:
            raise RankError(unreachable(self._rank, helper.to.peer, error)) from error

    def _answer(self, helper: Helper) -> tuple[Word, Tensor | None]:
        try:
            return helper.back.receive()
        except RuntimeError as error:
            wanted = "the model's output for a guidance branch"
            raise RankError(silent(self._rank, helper.back.peer, wanted, error)) from error

    def keep_alive(self) -> None:
        """Lets them know that their leader is."""
        for helper in self._helpers:
            if time.monotonic() - helper.to.sent > self._timeout / 8:
                self._say(helper, Word(Kind.ALIVE))

    def end(self, live: Live, failure: str | None) -> None:
        """Tells them what became of the run.

        Args:
            live: With the results.
            failure: Why it has failed, None where it has not.

        Raises:
            RankError: One of them is gone without the results.
        """
        for helper in self._helpers:
            try:
                if failure is not None:
                    self._say(helper, Word(Kind.FAILED, text=failure))
                elif live.result is not None and live.parallel is not None:
                    for image, x in zip(live.parallel.images, live.result, strict=True):
                        word = stop_word(image.index, image.iterations, image.error, x)
                        self._say(helper, word, x)
                helper.to.flush()
            except RuntimeError as error:
                helper.to.drop()
                if failure is None:
                    raise RankError(sentence_of(error, self._rank)) from error


def stop_word(
    image: int,
    iterations: int,
    error: float,
    x: Tensor,  # [D] fp32
    origin: int = 0,
) -> Word:
    """The word that an image has its result, ``x``."""
    return Word(
        Kind.STOP, image=image, iterate=iterations, value=error, size=x.numel(), origin=origin
    )


def finish_image(
    live: Live,
    word: Word,
    x: Tensor,  # [D] fp32
) -> None:
    """The image of a STOP has its result."""
    assert live.parallel is not None
    image = live.parallel.images[word.image]
    image.error = word.value
    image.finish(word.iterate)
    live.store([word.image], x[None])


def help_leader(
    live: Live, calls: Calls, leader: Helper, rank: int, greeting: str, dtype: torch.dtype
) -> None:
    """Evaluates a branch for the leader of the team until the run has its results.

    Args:
        live: The request, which gets them.
        calls: Of that branch.
        leader: The links to and from it.
        rank: This one.
        greeting: What run it is.
        dtype: Of the model.

    Raises:
        RankError: The run has failed.
    """
    left, wrong = live.count, ""
    while left:
        try:
            word, numbers = leader.back.receive()
        except RuntimeError as error:
            wanted = "the next model call"
            raise RankError(silent(rank, leader.back.peer, wanted, error)) from error
        if word.kind is Kind.GREETING and word.text != cut(greeting):
            wrong = differ(rank, greeting, word.text)
        elif word.kind is Kind.FAILED:
            raise RankError(word.text)
        elif word.kind is Kind.STOP and numbers is not None:
            finish_image(live, word, numbers)
            left -= 1
        elif word.kind is Kind.CALL and numbers is not None:
            flat: Tensor | None
            try:
                if wrong:
                    raise RankError(wrong)
                lines = Lines.unpack(numbers, word.block, live.request.x.shape[1:], dtype)
                (output,) = calls(lines)
                flat = output.float().flatten()
                answer = Word(Kind.OUTPUT, size=len(flat))
            except Exception as error:
                flat, answer = None, Word(Kind.FAILED, text=sentence_of(error, rank))
            with contextlib.suppress(RuntimeError):  # the next word tells
                leader.to.send(answer, flat)
                leader.to.flush()


def sentence_of(error: Exception, rank: int) -> str:
    """What all ranks are told of an error on one of them."""
    if isinstance(error, RankError):
        return str(error)
    return f"rank {rank}: {str(error) or repr(error)}"
