"""The tensors of the engine: the registers of every slot, kept outputs, one solver step for many.

Everything is allocated once. Which slot belongs to which row is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sidestep.kernels import solver_step
from sidestep.runtime.engine_rows import Row
from sidestep.runtime.engine_table import PlanTable
from sidestep.runtime.upload import select, upload


class EngineState:
    """Slots, each with the registers of one row and the last H outputs of the model for it.

    Attributes:
        shape: Of one latent.
        dtype: Of the model's inputs and outputs.
        device: Of everything.
        registers: ``[slots, R, D]`` fp32.
        kept: ``[slots * H * G, D]`` model dtype: place p of branch g of slot s is line
            ``(s * H + p) * G + g``.
        table: The plans in use.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        slots: int,
        registers: int,
        history: int,
        branches: int,
        table_steps: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates everything; see the attributes."""
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        self.size = math.prod(self.shape)
        self.history, self.branches = history, branches
        with torch.inference_mode(False):  # written to in either mode
            state: dict[str, Any] = {"dtype": torch.float32, "device": device}
            self.registers = torch.zeros(slots, registers, self.size, **state)
            kept = (slots * history * branches, self.size)
            self.kept = torch.zeros(kept, dtype=dtype, device=device)
            self.table = PlanTable(registers, table_steps, device)
            self._stats = torch.zeros(slots, 2, **state)
            self._zeros = torch.zeros(self.size, **state)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        table = self.table
        tensors = (
            self.registers, self.kept, self._stats, self._zeros, table.coefficients, table.inputs,
        )  # fmt: skip
        return sum(tensor.nbytes for tensor in tensors)

    def tick_bytes(self, entries: int) -> int:
        """Bytes that a tick of all slots takes for a while, at most, with so large a model call."""
        size, element, branches = self.size, self.dtype.itemsize, self.branches
        batch = size * (4 + element) + 64
        step = size * max(16 + 2 * branches * element, 8 + branches * (12 + element)) + 256
        return entries * batch + len(self.registers) * step

    def begin(self, rows: Sequence[Row]) -> None:
        """Rows of one request begin: where they were told to, or with the request's latents."""
        first = [row for row in rows if row.start is None]
        if first:
            x = select(first[0].live.request.x, [row.index for row in first])
            self._load(first, x[:, None])
        later = [row for row in rows if row.start is not None]
        if later:
            self._load(later, torch.stack([row.start for row in later if row.start is not None]))
            for row in later:
                row.start = None

    def _load(
        self,
        rows: Sequence[Row],
        start: Tensor,  # [n, r, ...]
    ) -> None:
        """The first r registers of these rows are given, the others are 0."""
        index = self._index([row.slot for row in rows])
        self.registers[index] = 0.0
        given = start.detach().to(self.device, torch.float32).flatten(2)
        self.registers[index, : given.shape[1]] = given

    def states(self, rows: Sequence[Row]) -> Tensor:  # [n, R, D]
        """A copy of all registers of these rows, fp32."""
        return self.registers[self._index([row.slot for row in rows])]

    def latents(self, rows: Sequence[Row]) -> Tensor:  # [n, *shape]
        """A copy of the latents of these rows, fp32."""
        return self.registers[self._index([row.slot for row in rows]), 0].view(-1, *self.shape)

    def inputs(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:  # [N, *shape], [N] fp32
        """What the model reads at the next step of these rows: ``scale * x``, and the time."""
        lines = self._index([row.line for row in rows])
        return self.read(lines, self._index([row.slot for row in rows]))

    def read(
        self,
        lines: Tensor,  # [N] int64
        slots: Tensor,  # [N] int64
    ) -> tuple[Tensor, Tensor]:  # [N, *shape], [N] fp32
        """`inputs` of the rows in these slots, at the steps in these lines of the plan table."""
        scale, t = self.table.inputs[lines].unbind(1)
        x = self.registers[slots, 0].mul_(scale[:, None])
        return x.to(self.dtype).view(-1, *self.shape), t.contiguous()

    def step(
        self,
        rows: Sequence[Row],  # n
        outputs: Sequence[Tensor],  # G of [n, D] model dtype
        weights: Tensor,  # [n, G] fp32
        noise: Sequence[Tensor | None],  # n of [D] fp32
    ) -> Tensor:  # [n, 2] fp32
        """One solver step of each row, in place.

        Returns:
            Mean step size and mean error estimate of each row, valid until the next step.
        """
        drawn = None if all(z is None for z in noise) else torch.stack(self.drawn(noise))
        lines = self._index([row.line for row in rows])
        return self.write(outputs, weights, drawn, lines, self._index([row.slot for row in rows]))

    def drawn(self, noise: Sequence[Tensor | None]) -> list[Tensor]:  # n of [D] fp32
        """Zeros for the rows that draw none."""
        return [self._zeros if z is None else z for z in noise]

    def write(
        self,
        outputs: Sequence[Tensor],  # G of [n, D] model dtype
        weights: Tensor,  # [n, G] fp32
        noise: Tensor | None,  # [n, D] fp32
        lines: Tensor,  # [n] int64
        slots: Tensor,  # [n] int64, all different
    ) -> Tensor:  # [n, 2] fp32
        """`step` of the rows in these slots, at the steps in these lines of the plan table."""
        stats, table = self.stats(len(slots)), self.table.coefficients
        solver_step(self.registers, outputs, weights, noise, table, lines, slots, None, stats)
        return stats

    def stats(self, count: int) -> Tensor:  # [n, 2] fp32
        """Where a step of so many rows leaves its mean step sizes and error estimates."""
        return self._stats[:count]

    def guidance(self, rows: Sequence[Row]) -> Tensor:  # [n, G] fp32
        """Guidance weights of the next step, 0 for the branches that a row has not."""
        G = max(row.live.branches for row in rows)
        lines = [[*row.guidance, *[0.0] * (G - row.live.branches)] for row in rows]
        return upload(lines, torch.float32, self.device)

    def keep(
        self,
        rows: Sequence[Row],  # n
        outputs: Sequence[Tensor],  # G of [n, D] model dtype
    ) -> None:
        """Keeps fresh outputs in the place of the oldest, for the steps that skip."""
        for row in rows:
            assert row.criterion is not None
            row.newest = (row.newest + 1) % self.history
            row.kept = min(row.kept + 1, row.criterion.history)
        for g, output in enumerate(outputs):
            self.kept.index_copy_(0, self._index([self._line(row, 0, g) for row in rows]), output)

    def reuse(self, rows: Sequence[Row]) -> list[Tensor]:  # G of [n, D] model dtype
        """What rows that skip go on with: ``offset + sum_i weights[i] * (i-th newest output)``.

        Formed branch by branch in fp32, newest first, the offset last: as `HeldOutput.reuse` does.
        """
        weights = [row.reuse for row in rows]
        total = self._aged(rows, 0)
        if any(of_row != (1.0,) for of_row in weights):
            total = total.float() * self._shares(weights, 0)
            for age in range(1, max(map(len, weights))):
                total += self._aged(rows, age).float() * self._shares(weights, age)
        if any(row.offset is not None for row in rows):
            added = [self._zeros if row.offset is None else row.offset for row in rows]
            total = total.float() + torch.stack(added)
        return list(total.to(self.dtype).unbind(0))

    def _shares(self, weights: Sequence[Sequence[float]], age: int) -> Tensor:  # [n, 1]
        """The weight of the outputs of that age; 0 where it is not looked at."""
        shares = [of_row[age] if age < len(of_row) else 0.0 for of_row in weights]
        return upload(shares, torch.float32, self.device)[:, None]

    def _aged(self, rows: Sequence[Row], age: int) -> Tensor:  # [G, n, D]
        """The kept outputs ``age`` computed steps back; the newest where there are fewer."""
        G = max(row.live.branches for row in rows)
        back = [age if age < len(row.reuse) else 0 for row in rows]
        lines = [self._line(row, a, g) for g in range(G) for row, a in zip(rows, back, strict=True)]
        return self.kept[self._index(lines)].view(G, len(rows), self.size)

    def _line(self, row: Row, age: int, branch: int) -> int:
        place = (row.newest - age) % self.history
        own = min(branch, row.live.branches - 1)  # of weight 0 beyond
        return (row.slot * self.history + place) * self.branches + own

    def _index(self, values: Sequence[int]) -> Tensor:
        return upload(values, torch.int64, self.device)
