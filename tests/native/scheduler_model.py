"""What the row scheduler promises, in the plainest way: the tests compare the two turn by turn."""

from __future__ import annotations

from dataclasses import dataclass, field

READY, SKIPPING, DONE, LAST = range(4)


@dataclass(eq=False)
class ModelRow:
    request: int
    row: int
    slot: int
    steps: int
    branches: int
    group: int
    since: int
    extension: int = -1
    step: int = 0
    state: str = "ready"
    ticket: int = -1


@dataclass
class Model:
    """A row scheduler of lists, without slots of its own: the real one's are filled in."""

    capacity: int
    queue: int
    buckets: tuple[int, ...]
    waiting: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)  # branches, group
    rows: list[ModelRow] = field(default_factory=list)
    extensions: list[ModelRow] = field(default_factory=list)  # without slots
    batches: list[list[ModelRow]] = field(default_factory=list)
    ids: int = 0
    numbers: int = 0
    clock: int = 0
    ended: dict[str, int] = field(default_factory=lambda: {"done": 0, "cancelled": 0, "failed": 0})

    def submit(self, rows: int, steps: int, branches: int, group: int) -> int | None:
        if steps and len(self.waiting) == self.queue:
            return None
        if steps:
            self.waiting.append((self.ids, rows, steps, branches, group))
            self.shapes[self.ids] = branches, group
        else:
            self.ended["done"] += 1
        self.ids += 1
        return self.ids - 1

    def waits(self, id: int) -> bool:
        return any(w[0] == id for w in self.waiting)

    def live(self, id: int) -> bool:
        return self.waits(id) or any(r.request == id for r in self.rows + self.extensions)

    def extend(self, id: int, row: int, steps: int) -> int:
        shape = self.shapes[id]
        grown = ModelRow(id, row, -1, steps, *shape, self.clock, self.numbers)
        self.extensions.append(grown)
        self.clock += 1
        self.numbers += 1
        return grown.extension

    def admit(self) -> list[tuple[int, int, int]]:
        """What came in, as (request, row, extension)."""
        entered: list[ModelRow] = []
        while True:
            able = [e for e in self.extensions if not self.waits(e.request)]
            if able and len(self.rows) < self.capacity:
                self.extensions.remove(able[0])
                self.rows.append(able[0])
                entered.append(able[0])
            elif self.waiting and self.waiting[0][1] <= self.capacity - len(self.rows):
                id, n, steps, branches, group = self.waiting.pop(0)
                for row in range(n):
                    self.rows.append(ModelRow(id, row, -1, steps, branches, group, self.clock))
                    entered.append(self.rows[-1])
                    self.clock += 1
            else:
                return [(r.request, r.row, r.extension) for r in entered]

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
        if self.live(row.request):
            return DONE
        self.ended["done"] += 1
        return LAST

    def drop(self, id: int, why: str) -> bool:
        known = self.live(id)
        self.rows = [r for r in self.rows if r.request != id]
        self.extensions = [r for r in self.extensions if r.request != id]
        self.waiting = [w for w in self.waiting if w[0] != id]
        self.ended[why] += known
        return known

    def drop_row(self, id: int, row: int) -> bool:
        was = self.live(id)
        self.rows = [r for r in self.rows if (r.request, r.row) != (id, row)]
        self.extensions = [r for r in self.extensions if (r.request, r.row) != (id, row)]
        over = was and not self.live(id)
        self.ended["done"] += over
        return over

    def counts(self) -> dict[str, int]:
        running = {r.request for r in self.rows + self.extensions if not self.waits(r.request)}
        return {
            "waiting": len(self.waiting),
            "running": len(running),
            "free": self.capacity - len(self.rows),
            "ready": sum(r.state == "ready" for r in self.rows),
            "in_flight": sum(r.state == "in flight" for r in self.rows),
            "submitted": self.ids,
            "extensions": len(self.extensions),
            **self.ended,
        }
