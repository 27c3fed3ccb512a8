"""The row scheduler against a simple model of it, turn by turn, and what it refuses."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from sidestep._native import QueueFull, RowScheduler

READY, SKIPPING, DONE, LAST = range(4)


@dataclass
class ModelRow:
    request: int
    row: int
    slot: int
    steps: int
    branches: int
    group: int
    since: int
    step: int = 0
    state: str = "ready"
    ticket: int = -1


@dataclass
class Model:
    """What the scheduler promises, in the plainest way."""

    capacity: int
    queue: int
    buckets: tuple[int, ...]
    waiting: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    rows: list[ModelRow] = field(default_factory=list)
    batches: list[list[ModelRow]] = field(default_factory=list)
    ids: int = 0
    clock: int = 0
    ended: dict[str, int] = field(default_factory=lambda: {"done": 0, "cancelled": 0, "failed": 0})

    def submit(self, rows: int, steps: int, branches: int, group: int) -> int | None:
        if steps and len(self.waiting) == self.queue:
            return None
        if steps:
            self.waiting.append((self.ids, rows, steps, branches, group))
        else:
            self.ended["done"] += 1
        self.ids += 1
        return self.ids - 1

    def admit(self) -> list[tuple[int, int]]:
        entered = []
        while self.waiting and self.waiting[0][1] <= self.capacity - len(self.rows):
            id, n, steps, branches, group = self.waiting.pop(0)
            for row in range(n):
                self.rows.append(ModelRow(id, row, -1, steps, branches, group, self.clock))
                entered.append((id, row))
                self.clock += 1
        return entered

    def next(self) -> list[tuple[int, int]] | None:
        """The entries of the batch as (request, row), padding left out."""
        ready = sorted((r for r in self.rows if r.state == "ready"), key=lambda r: r.since)
        chosen: list[ModelRow] = []
        for row in ready:
            room = self.buckets[-1] - sum(r.branches for r in chosen)
            if row.group == ready[0].group and row.branches <= room:
                chosen.append(row)
        if not chosen:
            return None
        chosen.sort(key=lambda r: -r.branches)
        for row in chosen:
            row.state, row.ticket = "in flight", len(self.batches)
        self.batches.append(chosen)
        most = chosen[0].branches
        return [(r.request, r.row) for g in range(most) for r in chosen if r.branches > g]

    def of_batch(self, ticket: int) -> list[ModelRow]:
        return [r for r in self.batches[ticket] if r in self.rows and r.ticket == ticket]

    def complete(self, ticket: int) -> list[tuple[int, int]]:
        rows = self.of_batch(ticket)
        for row in rows:
            row.state, row.ticket = "stepping", -1
        return [(r.request, r.row) for r in rows]

    def advance(self, slot: int, compute: bool) -> int:
        (row,) = [r for r in self.rows if r.slot == slot]
        row.step += 1
        if row.step < row.steps:
            row.state = "ready" if compute else "skipping"
            row.since = self.clock
            self.clock += compute
            return READY if compute else SKIPPING
        self.rows.remove(row)
        if any(r.request == row.request for r in self.rows):
            return DONE
        self.ended["done"] += 1
        return LAST

    def drop(self, id: int, why: str) -> bool:
        known = [r for r in self.rows if r.request == id]
        queued = [w for w in self.waiting if w[0] == id]
        self.rows = [r for r in self.rows if r.request != id]
        self.waiting = [w for w in self.waiting if w[0] != id]
        self.ended[why] += bool(known or queued)
        return bool(known or queued)

    def counts(self) -> dict[str, int]:
        return {
            "waiting": len(self.waiting),
            "running": len({r.request for r in self.rows}),
            "free": self.capacity - len(self.rows),
            "ready": sum(r.state == "ready" for r in self.rows),
            "in_flight": sum(r.state == "in flight" for r in self.rows),
            "submitted": self.ids,
            **self.ended,
        }


class Pair:
    """Does everything to both, and compares."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        size = self.random.randint(1, 6), self.random.randint(1, 4)
        buckets = self.random.choice([(3,), (1, 2, 5), (4, 8)])
        self.core, self.model = RowScheduler(*size, buckets), Model(*size, buckets)

    def submit(self) -> None:
        given = [self.random.randint(*span) for span in ((1, 3), (0, 4), (1, 3), (0, 1))]
        given[0] = min(given[0], self.model.capacity)
        expected = self.model.submit(*given)
        if expected is None:
            with pytest.raises(QueueFull, match="the queue is full"):
                self.core.submit(*given)
        else:
            assert self.core.submit(*given) == expected

    def next(self) -> None:
        entered = self.core.admit()
        assert [(id, row) for id, row, *_ in entered] == self.model.admit()
        for id, index, slot, step, position in entered:
            (row,) = [r for r in self.model.rows if (r.request, r.row) == (id, index)]
            row.slot = slot
            assert (step, position) == (0, -1)
        slots = [r.slot for r in self.model.rows]
        assert len(set(slots)) == len(slots)
        expected, got = self.model.next(), self.core.next()
        if expected is None or got is None:
            assert expected is got is None
            return
        ticket, rows, entries, size = got
        assert ticket == len(self.model.batches) - 1
        named = [(rows[position][0], rows[position][1]) for position, _ in entries]
        assert named[:size] == expected
        assert len(named) == min(b for b in self.model.buckets if b >= size)
        assert named[size:] == [named[0]] * (len(named) - size)
        assert [position for *_, position in rows] == list(range(len(rows)))

    def some_ticket(self) -> int:
        return self.random.randrange(len(self.model.batches))  # a stale one as well

    def complete(self) -> None:
        if self.model.batches:
            ticket = self.some_ticket()
            rows = self.core.complete(ticket)
            assert [(id, row) for id, row, *_ in rows] == self.model.complete(ticket)
            self.advance(rows)

    def skip(self) -> None:
        rows = self.core.skipping()
        expected = sorted(r.slot for r in self.model.rows if r.state == "skipping")
        assert [slot for _, _, slot, _, _ in rows] == expected
        self.advance(rows)

    def advance(self, rows: list[tuple[int, int, int, int, int]]) -> None:
        slots = [slot for _, _, slot, _, _ in rows]
        compute = [self.random.random() < 0.6 for _ in rows]
        expected = [self.model.advance(*pair) for pair in zip(slots, compute, strict=True)]
        assert self.core.advance(slots, compute) == expected

    def drop(self) -> None:
        if self.model.ids and self.random.random() < 0.3:
            id, failed = self.random.randrange(self.model.ids), self.random.random() < 0.5
            why = "failed" if failed else "cancelled"
            assert self.core.drop(id, failed) == self.model.drop(id, why)

    def fail(self) -> None:
        if self.model.batches and self.random.random() < 0.3:
            ticket = self.some_ticket()
            ids = list(dict.fromkeys(r.request for r in self.model.of_batch(ticket)))
            assert self.core.fail(ticket) == ids
            for id in ids:
                self.model.drop(id, "failed")


@pytest.mark.parametrize("seed", range(12))
def test_it_does_what_the_model_does(seed: int) -> None:
    pair = Pair(seed)
    turns = (pair.submit, pair.next, pair.next, pair.complete, pair.skip, pair.drop, pair.fail)
    for _ in range(300):
        pair.random.choice(turns)()
        assert pair.core.counts() == pair.model.counts()
    assert pair.model.ended["done"] > 3


def test_a_row_waits_for_a_bounded_number_of_calls() -> None:
    core = RowScheduler(12, 12, (4,))
    for i in range(12):
        core.submit(1, 50, 1 + i % 2, i % 3)
    core.admit()
    waits = dict.fromkeys(range(12), 0)
    for _ in range(60):
        ticket, rows, _, _ = core.next()
        waits = {id: waits[id] + 1 for id in waits} | {id: 0 for id, *_ in rows}
        slots = [slot for _, _, slot, _, _ in core.complete(ticket)]
        core.advance(slots, [True] * len(slots))
        assert max(waits.values()) <= 6  # 18 entries in calls of 4, three groups


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 1, (1,)), "capacity is 0, expected 1 to"),
        ((1, 0, (1,)), "queue is 0, expected 1 to"),
        ((1, 1, ()), "num_buckets is 0, expected 1 to"),
        ((1, 1, (2, 1)), r"buckets\[1\] is 1, expected 3 or more"),
        ((1, 1, (0,)), r"buckets\[0\] is 0, expected 1 or more"),
        ((1, 1, (1 << 40,)), "the largest bucket is"),
    ],
)
def test_sizes_are_checked(arguments: tuple, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RowScheduler(*arguments)


def test_what_is_refused_changes_nothing() -> None:
    core = RowScheduler(2, 2, (2,))
    core.submit(2, 3, 1, 0)
    core.admit()
    before = core.counts()
    for call, sentence in (
        (lambda: core.submit(3, 1, 1, 0), "3 rows, expected 1 to the capacity of 2"),
        (lambda: core.submit(1, 1, 3, 0), "3 branches, expected 1 to the largest bucket of 2"),
        (lambda: core.submit(1, -1, 1, 0), "-1 steps, expected 0 or more"),
        (lambda: core.complete(0), "complete of batch 0, which was never handed out"),
        (lambda: core.fail(-1), "fail of batch -1, which was never handed out"),
        (lambda: core.drop(1, False), "request 1 is unknown, expected 0 to 0"),
        (lambda: core.advance([0], [True]), "expected a row that has been completed or skips"),
        (lambda: core.advance([9], [True]), r"slots\[0\] = 9, expected a row"),
        (lambda: core.advance([0], []), "1 slots with 0 decisions"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
        assert core.counts() == before
    ticket, *_ = core.next()
    core.complete(ticket)
    with pytest.raises(ValueError, match="advance of slot 0 twice"):
        core.advance([0, 0], [True, True])
    assert core.advance([0, 1], [True, False]) == [READY, SKIPPING]
