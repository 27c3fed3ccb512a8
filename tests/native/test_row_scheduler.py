"""The row scheduler against a simple model of it, turn by turn, and what it refuses."""

from __future__ import annotations

import random

import pytest
from scheduler_model import READY, SKIPPING, Model

from sidestep._native import QueueFull, RowScheduler


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

    def extend(self) -> None:
        if not self.model.ids or self.random.random() < 0.5:
            return
        id = self.random.randrange(self.model.ids)
        given = [self.random.randint(*span) for span in ((0, 2), (1, 4))]
        if self.model.live(id):
            assert self.core.extend(id, *given) == self.model.extend(id, *given)
        else:
            with pytest.raises(ValueError, match=f"extend of request {id}, which has ended"):
                self.core.extend(id, *given)

    def next(self) -> None:
        entered = self.core.admit()
        assert [(id, row, number) for id, row, *_, number in entered] == self.model.admit()
        for *name, slot, step, position, number in entered:
            (row,) = [
                r for r in self.model.rows if [r.request, r.row, r.extension] == [*name, number]
            ]
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
        flying = [r.ticket for r in self.model.rows if r.state == "in flight"]
        if flying and self.random.random() < 0.5:
            return self.random.choice(flying)
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

    def drop_row(self) -> None:
        if self.model.ids and self.random.random() < 0.3:
            id, row = self.random.randrange(self.model.ids), self.random.randint(0, 3)
            if self.model.waits(id):
                with pytest.raises(ValueError, match=f"drop_row of request {id}, which waits"):
                    self.core.drop_row(id, row)
            else:
                assert self.core.drop_row(id, row) == self.model.drop_row(id, row)

    def fail(self) -> None:
        if self.model.batches and self.random.random() < 0.3:
            ticket = self.some_ticket()
            ids = list(dict.fromkeys(r.request for r in self.model.of_batch(ticket)))
            assert self.core.fail(ticket) == ids
            for id in ids:
                self.model.drop(id, "failed")


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_it_does_what_the_model_does(seed: int, grow: bool) -> None:
    pair = Pair(seed)
    turns = [pair.submit, pair.next, pair.next, pair.complete, pair.skip, pair.drop, pair.fail]
    if grow:
        turns += [pair.extend, pair.drop_row, pair.next, pair.complete, pair.complete]
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
