"""The coefficients of every plan in use, in one table on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sidestep.kernels import table_width
from sidestep.runtime.plan import Plan
from sidestep.runtime.upload import upload


@dataclass
class _Entry:
    lines: tuple[int, ...]
    users: int = 0


class PlanTable:
    """A bounded table; the steps of a plan are lines of it, anywhere.

    Requests with the same plan share its lines, and a plan that nobody uses any more stays until
    they are needed. A plan with fewer registers than the table has is filled up with registers
    that stay as they are, which changes no bit of the others.

    Attributes:
        coefficients: ``[steps + 1, (R + 1) * (R + 2) + 1]`` fp32, what `solver_step` reads.
        inputs: ``[steps + 1, 2]`` fp32: input scale and model time of each call.
        idle: The line of a step that changes nothing, the last one.
    """

    def __init__(self, registers: int, steps: int, device: torch.device) -> None:
        """Allocates it.

        Args:
            registers: R, the most that a plan may have.
            steps: Lines, of all plans in use together.
        """
        self.registers = registers
        width, fp32 = table_width(registers), torch.float32
        self.coefficients = torch.zeros(steps + 1, width, dtype=fp32, device=device)
        self.inputs = torch.zeros(steps + 1, 2, dtype=fp32, device=device)
        self.idle = steps
        matrix = self.coefficients[self.idle, :-1].view(registers + 1, registers + 2)
        matrix[:registers].fill_diagonal_(1.0)
        self._entries: dict[str, _Entry] = {}  # by the plan's digest, the longest unused first
        self._free = list(range(steps))[::-1]

    def acquire(self, plan: Plan) -> tuple[int, ...]:
        """The line of each step of the plan, which is written if it is not there.

        Raises:
            ValueError: The plan has too many registers, or is no table (see `Plan.table`).
            RuntimeError: The table is full of plans that are in use.
        """
        entry = self._entries.pop(plan.digest, None)
        if entry is None:
            coefficients = self._padded(plan)
            self._make_room(plan)
            entry = _Entry(tuple(self._free.pop() for _ in range(len(plan))))
            index = upload(entry.lines, torch.int64, self.inputs.device)
            self.coefficients[index] = coefficients.to(index.device)
            inputs = np.stack([plan.input_scales, plan.timesteps], axis=1).astype(np.float32)
            self.inputs[index] = torch.from_numpy(inputs).to(index.device)
        self._entries[plan.digest] = entry
        entry.users += 1
        return entry.lines

    def release(self, plan: Plan) -> None:
        """One request less uses the plan."""
        self._entries[plan.digest].users -= 1

    def _padded(self, plan: Plan) -> Tensor:  # [K, (R + 1) * (R + 2) + 1]
        R, own = self.registers, plan.registers
        if own > R:
            raise ValueError(
                f"Engine.submit: {plan.name} has {own} registers, expected at most the engine's {R}"
            )
        table, K = plan.table().numpy(), len(plan)
        lines = np.zeros((K, R + 1, R + 2), dtype=np.float32)
        lines[:, range(R), range(R)] = 1.0
        rows, columns = [*range(own), R], [*range(own), R, R + 1]
        lines[np.ix_(range(K), rows, columns)] = table[:, :-1].reshape(K, own + 1, own + 2)
        return torch.from_numpy(np.concatenate([lines.reshape(K, -1), table[:, -1:]], axis=1))

    def _make_room(self, plan: Plan) -> None:
        """Forgets plans that nobody uses until there are enough free lines."""
        idle = [key for key, entry in self._entries.items() if not entry.users]
        while len(self._free) < len(plan) and idle:
            self._free += self._entries.pop(idle.pop(0)).lines
        if len(self._free) < len(plan):
            raise RuntimeError(
                f"Engine.submit: no room for the {len(plan)} steps of {plan.name}, plans in use "
                f"hold {self.idle - len(self._free)} of {self.idle} lines; wait for "
                "results, or make the engine with more table_steps"
            )
