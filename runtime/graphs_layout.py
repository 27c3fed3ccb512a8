"""How the rows of a tick are laid out in a graph that may have room for more of them."""

from __future__ import annotations

from itertools import islice

from sidestep.runtime.engine_rows import Row
from sidestep.runtime.engine_step import Tick


class Layout:
    """Entries branch by branch, as in a `Batch`; what is over repeats row 0.

    Where all rows have the same branches and the entries are a multiple of them, each branch begins
    at the same entry for any number of rows, ``g P``; otherwise what is over is at the end.

    Attributes:
        most: P, the most rows that a model call of this size can serve.
        starts: ``[G]`` the entry that each branch begins at.
        positions: ``[N]`` the row of each entry.
        branches: ``[N]`` the branch of each entry.
        members: ``[N]`` that row itself.
    """

    def __init__(self, tick: Tick) -> None:
        """Lays out the rows of a tick, those with the most branches first."""
        counts = [row.live.branches for row in tick.rows]
        self.most = min(len(tick.state.registers), tick.entries // min(counts))
        self.starts: list[int] = []
        self.positions: list[int] = []
        self.branches: list[int] = []
        even = min(counts) == max(counts) and tick.entries % max(counts) == 0
        for g in range(max(counts)):
            self.starts.append(len(self.positions))
            having = [i for i, count in enumerate(counts) if count > g]
            if even:
                having += [0] * (tick.entries // max(counts) - len(having))
            self.positions += having
            self.branches += [g] * len(having)
        padding = tick.entries - len(self.positions)
        self.positions += [0] * padding
        self.branches += [0] * padding
        self.members: list[Row] = [tick.rows[i] for i in self.positions]

    def numbers(self, tick: Tick, most: int, steps: int) -> list[int]:
        """What `TickProgram.numbers` holds.

        A row that is not there has a slot to itself, and takes the step that changes nothing.
        """
        rows, idle = tick.rows, [tick.state.table.idle] * (most - len(tick.rows))
        used = {row.slot for row in rows}
        spare = (slot for slot in range(len(tick.state.registers)) if slot not in used)
        numbers = [*(row.slot for row in rows), *islice(spare, len(idle))]
        for j in range(steps):
            numbers += [*(row.live.table_lines[row.step + j] for row in rows), *idle]
        numbers += self.positions
        for g in range(len(self.starts)):
            own = (self.starts[min(g, row.live.branches - 1)] + i for i, row in enumerate(rows))
            numbers += [*own, *[0] * len(idle)]
        return numbers

    def weights(self, tick: Tick, most: int, steps: int) -> list[list[list[float]]]:  # [m][P][G]
        """What `TickProgram.weights` holds: 0 for a branch or a row that is not there."""
        G, missing = len(self.starts), most - len(tick.rows)
        weights = []
        for j in range(steps):
            given = [row.live.guidance(row.step + j) for row in tick.rows]
            filled = [[*of_row, *[0.0] * (G - len(of_row))] for of_row in given]
            weights.append(filled + [[0.0] * G] * missing)
        return weights
