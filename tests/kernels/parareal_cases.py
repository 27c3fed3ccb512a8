"""Arguments for the tests of the parareal operators, each in memory of its own amid NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")
GUARD = 64


class Arguments(NamedTuple):
    """The arguments of `parareal_correct_`, in its order; `difference_gram` takes two of them."""

    boundary: Tensor  # [n, R, D]
    fine: Tensor  # [n, R, D]
    new: Tensor  # [n, R+1, D]
    old: Tensor  # [n, R+1, D]
    coefficients: Tensor  # [n, R, R+1]

    def copy(self, device: str | None = None, offset: int = 0) -> Arguments:
        """Returns a copy amid NaN, `offset` elements past an aligned address."""
        return Arguments(*(guarded(tensor.to(device or tensor.device), offset) for tensor in self))

    def row(self, index: int) -> Arguments:
        """Returns one row, a slice of the same memory."""
        return Arguments(*(tensor[index : index + 1] for tensor in self))


@dataclass(frozen=True)
class Case:
    """One call; everything in it follows from these numbers."""

    D: int
    n: int
    R: int

    def __str__(self) -> str:
        return f"D{self.D}-n{self.n}-R{self.R}"

    def arguments(self) -> Arguments:
        """A third of the elements is equal in new and old, infinities and -0 in fine among them."""
        make = torch.Generator().manual_seed(self.D * 100 + self.n * 10 + self.R)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make)

        n, R, D = self.n, self.R, self.D
        new, fine = normal(n, R + 1, D), normal(n, R, D)
        old = new + 0.1 * normal(n, R + 1, D)
        new[..., 6::9] = INF
        old[..., ::3] = new[..., ::3]
        fine[..., ::9] = -0.0
        arguments = Arguments(normal(n, R, D), fine, new, old, normal(n, R, R + 1))
        return arguments.copy()

    def finite(self, device: str) -> Arguments:
        """The same without infinities."""
        arguments = self.arguments().copy(device)
        for tensor in arguments:
            tensor.nan_to_num_(posinf=0.5)
        return arguments

    def poisoned(self) -> Arguments:
        """The same with columns of zeros, and NaN in what they must not read."""
        arguments = self.arguments()
        for row in range(self.n):
            for r in range(self.R):  # each register leaves a column out
                arguments.coefficients[row, r, (row + r) % (self.R + 1)] = 0.0
            unused = row % (self.R + 1)
            arguments.coefficients[row, :, unused] = 0.0
            arguments.new[row, unused] = NAN
            arguments.old[row, unused] = 1.0
        arguments.boundary[:, 1:] = NAN  # of the old boundary register 0 alone is read
        return arguments


def guarded(tensor: Tensor, offset: int = 0) -> Tensor:
    """A contiguous copy whose surroundings are NaN."""
    memory = tensor.new_full((tensor.numel() + 2 * GUARD,), NAN)
    inside = memory[GUARD + offset : GUARD + offset + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


def surroundings_are_untouched(tensor: Tensor) -> bool:
    """Whether the memory around a guarded tensor is still NaN."""
    start = tensor.storage_offset()
    memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    around = torch.cat([memory[:start], memory[start + tensor.numel() :]])
    return around.numel() == 2 * GUARD and bool(around.isnan().all())


def value_cases() -> list[Case]:
    """Every R, odd sizes, several blocks and chunks, one row and many, and nothing at all."""
    sizes = (1, 7, 129, 1300, 4231)
    cases = [Case(D=sizes[(2 * R + n) % 5], n=n, R=R) for R in range(1, 7) for n in (1, 3)]
    cases += [Case(D=D, n=2, R=1) for D in (16, 1024, 8192)]
    return [*cases, Case(D=0, n=2, R=2), Case(D=129, n=0, R=2), Case(D=0, n=0, R=1)]
