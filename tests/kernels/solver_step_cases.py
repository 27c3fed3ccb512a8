"""Arguments for `solver_step` tests, poisoned with NaN wherever the step has no business."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidestep.kernels import table_width

NAN = float("nan")
STEPS = 6


class Arguments(NamedTuple):
    """The arguments of `solver_step`, in its order."""

    registers: Tensor  # [slots, R, D]
    outputs: list[Tensor]  # G of [rows, D]
    weights: Tensor  # [rows, G]
    noise: Any  # [rows, D] fp32, or None
    table: Tensor  # [STEPS, W]
    step: Tensor  # [rows]
    slot: Any  # [rows] or None
    model_input: Any  # [G, rows, D] or None
    stats: Tensor  # [rows, 2]

    def copy(self, device: str | None = None) -> Arguments:
        """Returns a copy that shares no memory with this one."""

        def copied(value: Any) -> Any:
            return None if value is None else value.clone().to(device or value.device)

        fields = {name: copied(getattr(self, name)) for name in self._fields if name != "outputs"}
        return Arguments(outputs=[copied(output) for output in self.outputs], **fields)

    def tensors(self) -> dict[str, Tensor]:
        """Returns every tensor by name."""
        named = {n: t for n, t in self._asdict().items() if isinstance(t, Tensor)}
        return named | {f"outputs[{g}]": output for g, output in enumerate(self.outputs)}


@dataclass(frozen=True)
class Case:
    """One call of `solver_step`; everything in it follows from these numbers."""

    D: int
    rows: int
    R: int
    G: int
    dtype: torch.dtype = torch.float32
    noise: bool = True
    permuted: bool = True
    model_input: bool = True

    def __str__(self) -> str:
        flags = [f for f in ("noise", "permuted", "model_input") if getattr(self, f)]
        name = str(self.dtype).removeprefix("torch.")
        return "-".join(
            [f"D{self.D}", f"rows{self.rows}", f"R{self.R}", f"G{self.G}", name, *flags]
        )

    def arguments(self) -> Arguments:
        """Returns the call's arguments on the CPU."""
        make = torch.Generator().manual_seed(hash((self.D, self.rows, self.R, self.G)) % 2**31)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make)

        slots = self.rows + 2
        order = torch.randperm(slots, generator=make)[: self.rows]
        owned = order if self.permuted else torch.arange(self.rows)
        step = torch.arange(self.rows) % STEPS
        table = self.table(make)
        registers = torch.full((slots, self.R, self.D), NAN)
        registers[owned] = normal(self.rows, self.R, self.D)
        outputs = [normal(self.rows, self.D).to(self.dtype) for _ in range(self.G)]
        weights = normal(self.rows, self.G)
        if self.G > 1:
            weights[1::2, 0] = 0.0
        noise = normal(self.rows, self.D) if self.noise else None
        arguments = Arguments(
            registers=registers,
            outputs=outputs,
            weights=weights,
            noise=noise,
            table=table,
            step=step,
            slot=owned if self.permuted else None,
            model_input=(
                torch.full((self.G, self.rows, self.D), NAN, dtype=self.dtype)
                if self.model_input
                else None
            ),
            stats=torch.full((self.rows, 2), NAN),
        )
        poison_unused(arguments)
        return arguments

    def table(self, make: torch.Generator) -> Tensor:  # [STEPS, W]
        """Dense, sparse, identity, no-op, all-zero and model-output-only steps, in this order."""
        R = self.R
        table = torch.randn(STEPS, table_width(R), generator=make)
        matrices = table[:, :-1].view(STEPS, R + 1, R + 2)
        matrices[1] *= torch.rand(R + 1, R + 2, generator=make) < 0.4
        matrices[2, 1:R] = torch.eye(R, R + 2)[1:]
        matrices[2, R] = 0.0
        matrices[3] = torch.eye(R + 1, R + 2)
        matrices[3, R] = 0.0
        matrices[4] = 0.0
        matrices[5, :, :R] = 0.0
        matrices[5, :, R + 1] = 0.0
        return table


def poison_unused(arguments: Arguments) -> None:
    """Puts NaN into everything that the row's step must not read (x, always read, excepted)."""
    R = arguments.registers.shape[1]
    for row, k in enumerate(arguments.step.tolist()):
        used = (arguments.table[k, :-1].view(R + 1, R + 2) != 0).any(0)
        owned = row if arguments.slot is None else int(arguments.slot[row])
        for i in range(1, R):
            if not used[i]:
                arguments.registers[owned, i] = NAN
        for g, output in enumerate(arguments.outputs):
            if not used[R] or arguments.weights[row, g] == 0:
                output[row] = NAN
        if arguments.noise is not None and not used[R + 1]:
            arguments.noise[row] = NAN


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers: signed zeros differ, and every NaN counts as the same."""
    same_nan = torch.where(tensor.isnan(), NAN, tensor.float()).to(tensor.dtype).cpu()
    return same_nan.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest distance in representable numbers between two tensors of one dtype."""
    if a.numel() == 0:
        return 0
    return int((bits(a).long() - bits(b).long()).abs().max())


def value_cases() -> list[Case]:
    """Every value of every parameter, and every pair of (R, G), in few enough blocks of D."""
    sizes, dtypes = (1, 129, 4231), (torch.float32, torch.float16, torch.bfloat16)
    cases: list[Case] = []
    for R in range(1, 7):
        for G in range(1, 4):
            i = len(cases)
            D = sizes[(R + G) % 3]
            cases.append(
                Case(
                    D=D,
                    rows=1 + i % 2 if D > 1024 else 1 + i * 2 % 5,
                    R=R,
                    G=G,
                    dtype=dtypes[(2 * R + G) % 3],
                    noise=i % 2 == 0,
                    permuted=i % 4 < 2,
                    model_input=i % 5 != 4,
                )
            )
    cases += [Case(D=D, rows=5, R=2, G=2, dtype=t) for D in (0, *sizes[:2]) for t in dtypes]
    cases += [Case(D=16384, rows=1, R=2, G=2, dtype=t, noise=t.itemsize == 2) for t in dtypes]
    cases += [Case(D=D, rows=0, R=3, G=2) for D in (0, 129)]
    cases += [Case(D=0, rows=3, R=1, G=1, permuted=False)]
    return cases
