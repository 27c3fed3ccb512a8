"""Which row has which slot of the engine, and which chains of SRDS wait for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sidestep.runtime.engine_rows import Live, Row


class Slots:
    """The rows in flight, as the row scheduler counts them."""

    def __init__(self, count: int) -> None:
        """All of them free."""
        self._rows: list[Row | None] = [None] * count
        self._waiting: dict[int, Row] = {}  # by number of the scheduler's extension

    def __getitem__(self, slot: int) -> Row:
        row = self._rows[slot]
        assert row is not None
        return row

    def wait(self, number: int, row: Row) -> None:
        """A row that is to be admitted under that number."""
        self._waiting[number] = row

    def admit(
        self, admitted: Sequence[tuple[int, int, int, int, int, int]], live: Mapping[int, Live]
    ) -> list[Row]:
        """Gives slots to rows.

        Args:
            admitted: What `RowScheduler.admit` returned.
            live: The requests by id.
        """
        rows = []
        for id, index, slot, _, _, number in admitted:
            row = live[id].rows[index] if number < 0 else self._waiting.pop(number)
            self._rows[slot], row.slot = row, slot
            rows.append(row)
        return rows

    def free(self, which: Callable[[Row], bool]) -> None:
        """Lets go of rows that the scheduler has let go of."""
        for slot, row in enumerate(self._rows):
            if row is not None and which(row):
                row.leave()
                self._rows[slot] = None
        self._waiting = {n: row for n, row in self._waiting.items() if not which(row)}
