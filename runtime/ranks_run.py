"""The blocks of one rank: SRDS as in the engine, with the boundaries before them from elsewhere.

The arithmetic is the engine's own (`EngineState`, `take_step`, `Chains`, `Parareal`), so that the
result is, too: the same bits, iterations and error estimates.  Nothing is gathered anywhere.  A
boundary goes to the rank of the next block with the residuals of those before it in its iterate
(and, for a coarse solver that looks back, one more vector), so that the rank of the last block has
them all when its own is formed; where the stopping rule looks at the beginning of the next iterate,
that goes ahead in a word of its own.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sidestep.kernels.core import PararealSchedule
from sidestep.runtime.engine_chains import Chains
from sidestep.runtime.engine_images import Boundary, Image, Start
from sidestep.runtime.engine_rows import Live, Row
from sidestep.runtime.engine_state import EngineState
from sidestep.runtime.engine_step import by_outputs, take_step
from sidestep.runtime.ranks_calls import Calls, Lines, Team, finish_image, stop_word
from sidestep.runtime.ranks_links import Kind, Word
from sidestep.runtime.ranks_ring import Item, Ring, Traffic
from sidestep.runtime.upload import select


class SharedSchedule(PararealSchedule):
    """The schedule of an image, some of whose blocks are with other ranks.

    It is told of their evaluations when one of their boundaries arrives, from which they follow.
    """

    def __init__(self, bounds: Sequence[int], iterations: int) -> None:
        """Nothing has been evaluated; see `PararealSchedule` for the arguments."""
        super().__init__(bounds, iterations)
        self._begun: set[tuple[int, int]] = set()
        self._ended: set[tuple[int, int]] = set()

    def coarse(self, block: int, iterate: int) -> list[Boundary]:
        """The first evaluation of that chain is there: what can be formed."""
        self._begun.add((block, iterate))
        formed: list[Boundary] = super().coarse(block, iterate)
        return formed

    def ended(self, block: int, iterate: int) -> list[Boundary]:
        """That chain has taken its last step: what can be formed."""
        self._ended.add((block, iterate))
        formed: list[Boundary] = super().ended(block, iterate)
        return formed

    def arrived(self, block: int, iterate: int) -> tuple[int, int, int, int]:
        """That boundary has been formed, here or elsewhere: the chain that it starts."""
        for p in range(iterate + 1):
            for i in range(max(1, p), block + 1):
                if p and (i, p - 1) not in self._ended:
                    self.ended(i, p - 1)
                if p < i and (i, p) not in self._begun:
                    self.coarse(i, p)
        chain: tuple[int, int, int, int] = self.chain(block + 1, iterate)
        return chain


class BlockRun:
    """One run, on a rank that has some of the blocks."""

    def __init__(
        self,
        live: Live,
        ring: Ring,
        calls: Calls,
        team: Team,
        traffic: Traffic,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates the registers of the rank's chains.

        Args:
            live: The request, which gets the results.
            ring: The ranks that share the blocks.
            calls: Of the model.
            team: Those who evaluate other branches for this rank.
            traffic: Over the ring.
            dtype: Of the model.
            device: Of everything.
        """
        assert live.parallel is not None
        self._live, self._parallel, self._ring = live, live.parallel, ring
        self._calls, self._team, self._traffic = calls, team, traffic
        parallel, plan = self._parallel, live.request.plan
        own = len(range(ring.place, parallel.blocks, ring.size))
        # the last fine step of a block and the first of its next iterate can come together
        slots = live.count * (own + 1)
        self._width = parallel.settings.width or own + 1
        self._state = EngineState(
            live.request.x.shape[1:],
            slots=slots,
            registers=plan.registers,
            history=0,
            branches=live.branches,
            table_steps=len(plan),
            dtype=dtype,
            device=device,
        )
        live.table_lines = self._state.table.acquire(plan)
        parallel.elsewhere = ring.size > 1
        self._free, self._rows = list(range(slots)), list[Row]()
        self._waiting: list[tuple[tuple[int, int, int, int], Row]] = []  # without a slot, a heap
        self._carried: dict[tuple[int, int, int], Tensor] = {}  # image, block, iterate: [B, 2]
        self._last = (parallel.blocks - 1) % ring.size == ring.place
        self.left = {image.index for image in parallel.images}

    def turn(self) -> None:
        """Takes in what has come, and makes a model call if anything can be evaluated."""
        idle = not self._rows and not self._waiting
        self.take_in(self._traffic.receive(idle, self._team.keep_alive))
        self._drop()
        self._admit()
        if self._rows:
            self._tick()
            self._traffic.settle()

    def start(self) -> None:
        """The first block begins, where it is."""
        if self._ring.place == 0:
            for row in self._live.rows:
                self._begin(row)

    def take_in(self, items: Iterable[Item]) -> None:
        """What the other ranks have said.

        Raises:
            FloatingPointError: The state of an image is not finite.
        """
        for word, numbers in items:
            image = self._parallel.images[word.image]
            if image.finished or numbers is None:
                continue
            if word.kind is Kind.STOP:
                finish_image(self._live, word, numbers)
                self.left.discard(word.image)
            elif word.kind is Kind.RESIDUALS:
                self._note(image, word.block, word.iterate, numbers.view(-1, 2))
            else:
                self._arrive(image, word, numbers)
        self._settle(self._parallel.judge())

    def _arrive(self, image: Image, word: Word, numbers: Tensor) -> None:
        """A boundary: the block after it starts from it, or has already."""
        residuals = numbers[-2 * self._parallel.blocks :].view(-1, 2)
        state = numbers[: -residuals.numel()].view(-1, self._live.request.x[0].numel())
        registers = self._live.request.plan.registers
        schedule = image.schedule
        assert isinstance(schedule, SharedSchedule)
        chain = self._parallel.chain(*schedule.arrived(word.block, word.iterate))
        if self._last:
            self._note(image, word.block, word.iterate, residuals)
        if chain.block < self._parallel.blocks:
            self._carried[image.index, chain.block, chain.iterate] = residuals
        if len(state) > registers:
            image.past.before[chain.key] = state[registers]
        if word.kind is Kind.STATE:
            self._begin(self._live.follow(Start(image, chain, state[:registers])))
            return
        for start in self._parallel.share(image, chain):
            self._pass_on(start)

    def _note(
        self,
        image: Image,
        block: int,
        iterate: int,
        residuals: Tensor,  # [B, 2]
    ) -> None:
        """Residuals of an iterate as far as that block, for the stopping rule."""
        told = residuals.tolist()
        for i in range(max(1, iterate), block + 1):
            change, size = told[i - 1]
            image.residuals[i, iterate] = change, size

    def _begin(self, row: Row) -> None:
        heapq.heappush(self._waiting, (_urgency(row), row))

    def _drop(self) -> None:
        """Lets go of the chains of images that have their results."""
        for row in self._rows:
            if row.superfluous:
                row.leave()
                self._free.append(row.slot)
        self._rows = [row for row in self._rows if not row.superfluous]
        self._waiting = [entry for entry in self._waiting if not entry[1].superfluous]
        heapq.heapify(self._waiting)

    def _admit(self) -> None:
        """Chains that wait move into free slots, the most urgent first."""
        admitted = []
        while self._waiting and self._free:
            _, row = heapq.heappop(self._waiting)
            row.slot = self._free.pop()
            admitted.append(row)
        self._state.begin(admitted)
        self._rows += admitted

    def _tick(self) -> None:
        """One model call, and what follows from it."""
        rows = self._choose()
        for row in rows:
            row.enter()
        x, t = self._state.inputs(rows)
        lines = Lines(x, t, [row.index for row in rows], [row.step for row in rows])
        outputs = self._team.evaluate(self._calls, lines)
        places = {row: i for i, row in enumerate(rows)}

        def fresh(some: Sequence[Row]) -> list[Tensor]:
            return [select(output, [places[row] for row in some]) for output in outputs]

        chains = Chains(self._state, rows)
        taken = take_step(self._state, rows, by_outputs(self._state, fresh), _raise)
        (followed,) = chains.follow(taken, _raise)
        ended = {row for row in rows if row.ends}
        for row in rows:
            row.step += 1
        self._free += [row.slot for row in ended]
        self._rows = [row for row in self._rows if row not in ended]
        for start in followed.starts:
            self._pass_on(start)
        self._settle(followed.finished)

    def _choose(self) -> list[Row]:
        """The rows of the next call, the most urgent ones if there is no room for all."""
        chosen: list[Row] = []
        taken: Counter[int] = Counter()
        for row in sorted(self._rows, key=_urgency):
            if taken[row.index] < self._width and (
                not self._calls.most or len(chosen) < self._calls.most
            ):
                taken[row.index] += 1
                chosen.append(row)
        return chosen

    def _pass_on(self, start: Start) -> None:
        """A boundary has been formed here, from which the next block starts, wherever that is."""
        image, block, iterate = start.image, start.chain.block - 1, start.chain.iterate
        if self._ring.size == 1:
            self._begin(self._live.follow(start))
            return
        residuals = self._carried.pop((image.index, block, iterate), None)
        if residuals is None:  # the first boundary of its iterate, or of all
            residuals = torch.zeros(self._parallel.blocks, 2, device=start.state.device)
        if not image.finished:
            residuals[block - 1] = torch.tensor(image.residuals[block, iterate])
            before = image.past.before.pop(start.chain.key, start.state[:0])
            parts = [start.state.flatten(), before.flatten()] if start.moved else []
            numbers = torch.cat([*parts, residuals.flatten()])
            kind = Kind.STATE if start.moved else Kind.KEPT
            word = Word(kind, image.index, block, iterate, size=len(numbers))
            self._traffic.send(word, numbers)
            needed = 0 if iterate < 2 or self._last else self._parallel.stop.needed(iterate - 1)
            if block == needed:
                ahead = replace(word, kind=Kind.RESIDUALS, size=residuals.numel())
                self._traffic.send(ahead, residuals.flatten())

    def _settle(self, finished: Sequence[Image]) -> None:
        """Images that have converged: all ranks are told, with the result."""
        for image in finished:
            x = image.latents.pop(image.iterations)
            self._live.store([image.index], x[None])
            self.left.discard(image.index)
            self._traffic.send(
                stop_word(image.index, image.iterations, image.error, x, self._ring.place), x
            )


def _urgency(row: Row) -> tuple[int, int, int, int]:
    """Low iterates first: an evaluation after the first of its chain belongs to the next one."""
    assert row.chain is not None
    later = row.step > row.chain.first
    return row.chain.iterate + later, row.chain.block, row.index, row.chain.iterate


def _raise(live: Live, error: Exception) -> None:
    raise error
