"""The engine: requests go in, batches for the model come out, and it never calls the model itself.

    engine = Engine((4, 64, 64), capacity=32)
    engine.submit(Request(plan, x, conditioning=text, guidance=(-6.5, 7.5)))
    for batch in engine:
        engine.complete(batch, model(batch.x, batch.t, batch.conditioning))
    pictures = engine.results()

Requests with different plans, steps and methods join and leave at any tick.  Which rows go into the
next call is decided in `csrc/core/row_scheduler.cpp`, on numbers; the tensors are in `EngineState`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sidestep.kernels.checks import MAX_BRANCHES, MAX_REGISTERS
from sidestep.kernels.core import QueueFull, RowScheduler
from sidestep.runtime.engine_batch import make_batch, outputs_of
from sidestep.runtime.engine_chains import Chains, Followed
from sidestep.runtime.engine_check import (
    check_batch,
    check_live,
    check_output,
    check_request,
    check_settings,
)
from sidestep.runtime.engine_conditioning import Groups
from sidestep.runtime.engine_request import Batch, Request, Result, Status
from sidestep.runtime.engine_rows import Live, Row
from sidestep.runtime.engine_slots import Slots
from sidestep.runtime.engine_state import EngineState
from sidestep.runtime.engine_step import (
    Take,
    Taken,
    Tick,
    by_outputs,
    by_request,
    foreseen,
    take_step,
)

__all__ = ["Batch", "Engine", "QueueFull", "Request", "Result"]

BUCKETS = (1, 2, 4, 8, 16, 32)
_DONE, _LAST = 2, 3  # sidestep_row_state of scheduler.h
_numbers = itertools.count()


class Engine:
    """Steps the rows of many requests through their plans, with as few model calls as they need.

    All memory of its own is allocated at the beginning. It may be used from several threads; a
    callback of a request may submit and cancel, and nothing else.

    Attributes:
        shape: Of one latent.
        dtype: Of the model's inputs and outputs.
        device: Of the state, and of what the model gets.
        capacity: Rows in flight at most.
        buckets: Sizes of a model call, ascending.
        registers: Most registers of a plan.
        history: Most outputs that a method may look back on.
        branches: Most guidance branches.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        capacity: int = 32,
        buckets: Sequence[int] = BUCKETS,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        registers: int = 4,
        history: int = 3,
        branches: int = 2,
        queue: int = 1024,
        table_steps: int = 16384,
    ) -> None:
        """Allocates everything.

        Args:
            shape: Of one latent, such as (4, 64, 64).
            capacity: Rows in flight at most: slots. More requests wait.
            buckets: Sizes of a model call, in entries: a row with G branches has G of them.
            dtype: float32, float16 or bfloat16. The state is float32 in any case.
            device: A CPU or CUDA device.
            registers: Most registers that a plan may have, 1 to 6.
            history: Outputs kept of each row for the steps that skip; 0 without methods.
            branches: Most guidance branches of a request, 1 to 3.
            queue: Requests that may wait.
            table_steps: Steps of all plans in use together.

        Raises:
            ValueError: A size is out of range.
            TypeError: The model cannot have that dtype.
        """
        self.shape, self.dtype = tuple(map(int, shape)), dtype
        bounds = {
            "registers": (registers, 1, MAX_REGISTERS),
            "branches": (branches, 1, MAX_BRANCHES),
            "history": (history, 0, 64),
            "table_steps": (table_steps, 1, 1 << 24),
        }
        self.device = check_settings(self.shape, dtype, device, bounds)
        self.capacity, self.buckets = int(capacity), tuple(map(int, buckets))
        self.registers, self.history, self.branches = registers, history, branches
        self._scheduler = RowScheduler(self.capacity, queue, self.buckets)
        self._state = EngineState(
            self.shape,
            slots=self.capacity,
            registers=registers,
            history=history,
            branches=branches,
            table_steps=table_steps,
            dtype=dtype,
            device=self.device,
        )
        self._groups = Groups()
        self._live: dict[int, Live] = {}
        self._slots = Slots(self.capacity)
        self._results: list[Result] = []
        self._lock, self._turning = threading.RLock(), ""
        self._number = next(_numbers)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the engine holds from its beginning to its end, whatever the requests."""
        return self._state.nbytes

    @property
    def tick_bytes(self) -> int:
        """Bytes that a tick takes for a while, at most: a batch's latents, and one step's copies.

        Conditioning, noise, results, what a method keeps (`Adaptive` two fp32 latents a row) and
        the copies that SRDS makes of the ends of its blocks are the requests' own.
        """
        return self._state.tick_bytes(self.buckets[-1])

    def counts(self) -> dict[str, int]:
        """Requests ``waiting``, ``running``, ``submitted``, ``done``, ``cancelled`` and ``failed``;
        slots ``free``; rows ``ready`` for the model and ``in_flight``."""
        with self._lock:
            return self._scheduler.counts()

    def submit(self, request: Request) -> int:
        """Queues a request; it begins at a later `next`, when there are slots for all its rows.

        Returns:
            Its id.

        Raises:
            ValueError: The request does not fit this engine, or misses something.
            QueueFull: Too many requests wait; nothing was changed.
            RuntimeError: Too many different plans are in use; nothing was changed.
        """
        check_request(request, self.shape)
        live = Live(request, self.device)
        check_live(live, self.branches, self.history)
        with self._lock:
            if live.steps:
                live.table_lines = self._state.table.acquire(request.plan)
            group = self._groups.join(live.conditioning.key)
            try:
                live.id = self._scheduler.submit(live.count, live.first, live.branches, group)
            except BaseException:
                self._leave(live)
                raise
            self._live[live.id] = live
            if not live.steps:
                self._finish(live, "done")
        return live.id

    def cancel(self, id: int) -> bool:
        """Ends a request wherever it is; a batch that it has rows in stays valid without them.

        Returns:
            Whether it had not ended before.

        Raises:
            ValueError: No request has that id.
        """
        with self._lock:
            cancelled = self._scheduler.drop(id, False)
            if cancelled:
                self._finish(self._live[id], "cancelled")
            return cancelled

    def results(self) -> list[Result]:
        """The requests that have ended since the last call, in that order."""
        with self._lock:
            ended, self._results = self._results, []
            return ended

    def __iter__(self) -> Iterator[Batch]:
        """`next` until nothing is ready: complete or fail each batch before asking for another."""
        while (batch := self.next()) is not None:
            yield batch

    @torch.no_grad()
    def next(self) -> Batch | None:
        """The next model call; None when nothing needs the model now.

        Several batches may be out at once, and come back in any order.
        """
        with self._turn("next"):
            self._admit()
            while (chosen := self._scheduler.next()) is not None:
                ticket, rows, entries, size = chosen
                members = [self._slots[slot] for _, _, slot, _, _ in rows]
                try:
                    return make_batch(self._state, self._number, ticket, members, entries, size)
                except Exception as error:
                    self._fail(ticket, error)
            return None

    @torch.no_grad()
    def complete(
        self,
        batch: Batch,
        output: Tensor,  # [N, *shape] model dtype
    ) -> None:
        """Takes the model's output: its rows step, and those that skip run on until they need it.

        Rows of requests that have ended meanwhile are left out, and a batch that was completed or
        failed before changes nothing.

        Raises:
            ValueError: The output has another shape or device, or the batch is another engine's.
                Nothing was changed: the batch can be completed again, or failed.
            TypeError: It has another dtype.
        """
        check_batch(batch, self._number, "complete")
        check_output(output, len(batch), self.shape, self.dtype, self.device)
        with self._turn("complete"):
            self._step(batch.ticket, by_outputs(self._state, outputs_of(batch, output)))

    @torch.no_grad()
    def tick(self, evaluate: Callable[[Tick], Taken]) -> bool:
        """`next` and `complete` in one turn; `EngineLoop` is made of it.

        Args:
            evaluate: Makes the model call of these rows and takes their step, or several. What it
                raises ends their requests.

        Returns:
            False when nothing needs the model now.
        """
        with self._turn("tick"):
            self._admit()
            chosen = self._scheduler.next()
            if chosen is None:
                return False
            ticket, members, entries, _ = chosen
            rows = [self._slots[slot] for _, _, slot, _, _ in members]
            run = foreseen(rows, self._scheduler.counts())

            def take(rows: Sequence[Row], noise: Sequence[Tensor | None]) -> Taken:
                return Tick(self._state, rows, noise, len(entries), run).by(evaluate)

            if (taken := self._step(ticket, take)) is not None:
                self._repeat(taken)
            return True

    def fail(self, batch: Batch, error: Exception) -> None:
        """The model call failed, and with it the requests that have rows in this batch.

        Raises:
            ValueError: The batch is another engine's.
        """
        check_batch(batch, self._number, "fail")
        with self._turn("fail"):
            self._fail(batch.ticket, error)

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """One thread at a time turns the engine, and not from inside a turn."""
        with self._lock:
            if self._turning:
                raise RuntimeError(
                    f"Engine.{name}: called from a callback inside Engine.{self._turning}, "
                    "expected only submit, cancel, results and counts there"
                )
            self._turning = name
            try:
                yield
            finally:
                self._turning = ""

    def _admit(self) -> None:
        """Waiting requests move into free slots."""
        for live, rows in by_request(self._slots.admit(self._scheduler.admit(), self._live)):
            try:
                self._state.begin(rows)
            except Exception as error:
                self._end(live, error)

    def _step(self, ticket: int, take: Take) -> Taken | None:
        """The rows of a batch step, and those that skip run on until they need the model."""
        rows = []
        for _, _, slot, _, position in self._scheduler.complete(ticket):
            rows.append(row := self._slots[slot])
            row.position = position
            row.live.count_call(row.index, ticket)
        taken = self._advance(rows, take) if rows else None
        while skipping := self._scheduler.skipping() if rows else ():
            members = [self._slots[slot] for _, _, slot, _, _ in skipping]
            self._advance(members, by_outputs(self._state, self._state.reuse))
        return taken

    def _repeat(self, taken: Taken) -> None:
        """Writes down the steps that were taken in one go with the first."""
        try:
            for _ in range(taken.steps - 1):
                if (following := self._scheduler.next()) is not None:
                    self._step(following[0], lambda rows, noise: taken)
        except BaseException as error:  # their registers are ahead of what is known of them
            for live, _ in by_request(taken.rows):
                self._end(live, RuntimeError(f"Engine.tick: broken off by {error!r}"))
            raise

    def _advance(self, rows: Sequence[Row], take: Take) -> Taken | None:
        """One step of these rows; what goes wrong in the middle ends their requests only."""
        taken = None
        try:
            chains = Chains(self._state, rows)
            taken = take_step(self._state, rows, take, self._end)
            self._follow(chains.follow(taken, self._end))
        except BaseException as error:
            why = error
            if not isinstance(why, Exception):  # Ctrl-C: half a step cannot be taken up again
                why = RuntimeError(f"Engine.complete: broken off by {error!r}")
            for live, _ in by_request(rows):
                self._end(live, why)
            if why is not error:
                raise
        rows = [row for row in rows if not row.live.ended and not row.superfluous]
        compute = [row.computes for row in rows]
        states = self._scheduler.advance([row.slot for row in rows], compute)
        for row in rows:
            row.step += 1
        done = {row for row, became in zip(rows, states, strict=True) if became >= _DONE}
        self._slots.free(lambda row: row in done)
        for live, members in by_request(row for row in rows if row in done and row.chain is None):
            live.store([row.index for row in members], self._state.latents(members).flatten(1))
        for row, became in zip(rows, states, strict=True):
            if became == _LAST:
                self._finish(row.live, "done")
        for live, _ in by_request(rows):
            live.forget_noise()
        return taken

    def _follow(self, outcome: Sequence[Followed]) -> None:
        """What this tick has made possible in requests with SRDS is done."""
        for followed in outcome:
            live, finished = followed.live, followed.finished
            if live.ended:  # by its callback
                continue
            for image in finished:
                live.store([image.index], image.latents.pop(image.iterations)[None])
            for start in followed.starts:
                if not start.image.finished:
                    row = live.follow(start)
                    number = self._scheduler.extend(live.id, row.index, start.chain.steps)
                    self._slots.wait(number, row)
            for image in finished:
                ended = self._scheduler.drop_row(live.id, image.index)
                self._slots.free(lambda row: row.superfluous)
                if ended:
                    self._finish(live, "done")

    def _fail(self, ticket: int, error: Exception) -> None:
        for id in self._scheduler.fail(ticket):
            self._finish(self._live[id], "failed", error)

    def _end(self, live: Live, error: Exception) -> None:
        """A request fails by itself, without its batch."""
        if not live.ended:
            self._scheduler.drop(live.id, True)
            self._finish(live, "failed", error)

    def _finish(self, live: Live, status: Status, error: Exception | None = None) -> None:
        """The scheduler has let go of a request: so does the engine, and keeps the result."""
        self._slots.free(lambda row: row.live is live)
        del self._live[live.id]
        self._leave(live)
        self._results.append(live.end(status, error))

    def _leave(self, live: Live) -> None:
        self._groups.leave(live.conditioning.key)
        if live.steps:
            self._state.table.release(live.request.plan)
