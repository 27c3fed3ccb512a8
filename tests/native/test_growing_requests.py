"""Requests that grow while they run: who has the slots, who has the turns, and how they end."""

from __future__ import annotations

import pytest
from scheduler_model import DONE, LAST, READY

from sidestep._native import RowScheduler


class Core(RowScheduler):
    """Remembers which extension is in which slot."""

    def __init__(self, *sizes: object) -> None:
        super().__init__(*sizes)
        self.number: dict[int, int] = {}

    def admitted(self) -> list[tuple[int, int, int]]:
        """(request, row, extension) of the rows that are admitted now."""
        rows = self.admit()
        self.number |= {slot: number for _, _, slot, _, _, number in rows}
        return [(id, row, number) for id, row, *_, number in rows]

    def call(self) -> tuple[list[tuple[int, int]], list[int]]:
        """One model call: the (request, extension) of its rows, and what became of each."""
        ticket, rows, _, _ = self.next()
        who = [(id, self.number[slot]) for id, _, slot, _, _ in rows]
        slots = [slot for _, _, slot, _, _ in self.complete(ticket)]
        return who, self.advance(slots, [True] * len(slots))


def test_extensions_are_admitted_before_requests_but_not_before_their_own() -> None:
    core = Core(3, 8, (4,))
    running = core.submit(2, 2, 1, 0)
    assert core.admitted() == [(0, 0, -1), (0, 1, -1)]
    waiting, other = core.submit(2, 2, 1, 0), core.submit(1, 1, 1, 0)
    early = core.extend(waiting, 0, 1)
    first, second = core.extend(running, 5, 1), core.extend(running, 5, 1)
    assert (early, first, second) == (0, 1, 2)
    assert core.admitted() == [(running, 5, first)]  # one slot was free; not `early`
    core.call()
    assert core.admitted() == [(running, 5, second)]
    core.call()  # ends all that runs
    assert core.counts() == {
        "waiting": 2,
        "running": 0,
        "free": 3,
        "ready": 0,
        "in_flight": 0,
        "submitted": 3,
        "done": 1,
        "cancelled": 0,
        "failed": 0,
        "extensions": 1,
    }
    assert core.admitted() == [(waiting, 0, -1), (waiting, 1, -1), (waiting, 0, early)]
    assert core.counts()["waiting"] == 1 and core.submit(1, 1, 1, 0) == other + 1


def test_an_extension_is_not_starved_by_new_requests() -> None:
    core = Core(4, 8, (1,))
    id = core.submit(1, 1, 1, 0)
    late = core.extend(id, 0, 3)
    core.admitted()
    turns = []
    for turn in range(60):
        while core.counts()["waiting"] < 3:
            core.submit(1, 2, 1, 0)
        core.admitted()
        who, _ = core.call()
        if who == [(id, late)]:
            turns.append(turn)
    assert len(turns) == 3 and turns[-1] <= 3 * 4


def test_many_extensions_do_not_hold_up_requests_for_ever() -> None:
    core = Core(2, 8, (2,))
    grown = core.submit(1, 1, 1, 0)
    core.admitted()
    for _ in range(9):
        core.extend(grown, 0, 2)
    small = core.submit(1, 1, 1, 0)
    calls = 0
    while core.counts()["done"] < 2:
        core.admitted()
        core.call()
        calls += 1
    assert calls == 10  # 1 + 9 * 2 + 1 evaluations, two at a time
    assert core.drop(small, False) is False


def test_an_extension_keeps_a_request_alive() -> None:
    core = Core(2, 2, (2,))
    id = core.submit(1, 2, 1, 0)
    core.admitted()
    assert core.call()[1] == [READY]
    ticket, *_ = core.next()
    ((_, _, slot, step, _),) = core.complete(ticket)
    assert step == 1
    late = core.extend(id, 0, 1)
    assert core.advance([slot], [True]) == [DONE]
    assert core.counts()["running"] == 1 and core.counts()["extensions"] == 1
    assert core.admitted() == [(id, 0, late)]
    assert core.call() == ([(id, late)], [LAST])
    with pytest.raises(ValueError, match="extend of request 0, which has ended"):
        core.extend(id, 0, 1)
    assert core.drop_row(id, 0) is False


def test_drop_row_finds_it_everywhere() -> None:
    core = Core(6, 2, (3, 6))
    id = core.submit(2, 4, 1, 0)
    core.admitted()
    skipping, *_ = core.next()
    core.advance([slot for _, _, slot, _, _ in core.complete(skipping)], [False, True])
    flying_extension = core.extend(id, 0, 4)
    core.admitted()
    flying, rows, _, _ = core.next()
    assert [row for _, row, *_ in rows] == [1, 0]
    ready = core.extend(id, 0, 4)
    core.extend(id, 1, 4)
    core.admitted()
    assert (flying_extension, ready) == (0, 1)
    for _ in range(4):
        core.extend(id, 0, 4)  # two of these wait
    core.admitted()
    assert core.counts()["free"] == 0 and core.counts()["extensions"] == 3
    # row 0: one skips, one is in flight, two are ready or more, three wait
    assert core.drop_row(id, 0) is False
    assert core.counts()["free"] == 4 and core.counts()["extensions"] == 0
    assert core.skipping() == []
    stepping = core.complete(flying)
    assert [(row, position) for _, row, _, _, position in stepping] == [(1, 0)]
    assert core.drop_row(id, 7) is False
    assert core.drop_row(id, 1) is True  # while it steps
    assert core.counts()["done"] == 1 and core.counts()["free"] == 6
    with pytest.raises(ValueError, match="expected a row that has been completed or skips"):
        core.advance([stepping[0][2]], [True])
    assert core.next() is None and core.admit() == []


def test_a_failed_batch_ends_grown_requests_whole() -> None:
    core = Core(3, 2, (1,))
    grown, other = core.submit(1, 3, 1, 0), core.submit(1, 3, 1, 1)
    core.admitted()
    core.extend(grown, 0, 3)
    core.admitted()
    core.extend(grown, 0, 3)
    core.extend(other, 0, 3)
    assert core.counts()["extensions"] == 2
    ticket, ((id, *_),), _, _ = core.next()
    assert id == grown and core.fail(ticket) == [grown]
    assert core.counts()["free"] == 2 and core.counts()["extensions"] == 1
    assert core.counts()["running"] == 1 and core.counts()["failed"] == 1
    assert core.admitted() == [(other, 0, 2)]
    assert core.drop(other, False) is True
    assert core.counts()["free"] == 3 and core.counts()["extensions"] == 0


def test_a_request_that_waits_is_dropped_with_its_extensions() -> None:
    core = Core(1, 2, (1,))
    core.submit(1, 1, 1, 0)
    core.admitted()
    id = core.submit(1, 1, 1, 0)
    core.extend(id, 0, 1)
    assert core.drop(id, False) is True
    assert core.counts()["extensions"] == 0 and core.counts()["waiting"] == 0


def test_what_is_refused_changes_nothing() -> None:
    core = Core(1, 2, (2,))
    core.submit(1, 3, 1, 0)
    core.admitted()
    waits = core.submit(1, 3, 1, 0)
    before = core.counts()
    for refused, sentence in (
        (lambda: core.extend(2, 0, 1), "request 2 is unknown, expected 0 to 1"),
        (lambda: core.extend(0, 0, 0), "the extension has 0 steps, expected 1 or more"),
        (lambda: core.drop_row(-1, 0), "request -1 is unknown, expected 0 to 1"),
        (lambda: core.drop_row(waits, 0), "drop_row of request 1, which waits, expected one that"),
    ):
        with pytest.raises(ValueError, match=sentence):
            refused()
        assert core.counts() == before
    assert core.extend(0, -3, 1) == 0  # any index
