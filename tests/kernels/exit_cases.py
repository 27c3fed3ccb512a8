"""Arguments for the tests of the exit operators, each in memory of its own amid NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from parareal_cases import NAN, guarded
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Score(NamedTuple):
    """The tensors of `exit_score`, in its order."""

    hidden: Tensor  # [B, N, D]
    probe: Tensor  # [k, D]
    bias: Tensor  # [B, k]

    def to(self, device: str, offset: int = 0) -> Score:
        """Returns a contiguous copy amid NaN, `offset` elements past an aligned address."""
        return Score(*(guarded(tensor.to(device), offset) for tensor in self))

    def row(self, index: int) -> Score:
        """Returns one row, a slice of the same memory."""
        return self._replace(
            hidden=self.hidden[index : index + 1], bias=self.bias[index : index + 1]
        )

    def amid_other_tokens(self) -> Score:
        """The same as a slice of more tokens and of wider ones, which are NaN."""
        B, N, D = self.hidden.shape
        memory = self.hidden.new_full((B, N + 3, D + 5), NAN)
        memory[:, 2 : 2 + N, :D] = self.hidden
        return self._replace(hidden=memory[:, 2 : 2 + N, :D])


@dataclass(frozen=True)
class ScoreCase:
    """One call of `exit_score`; everything in it follows from these numbers."""

    B: int
    N: int
    D: int
    k: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"B{self.B}-N{self.N}-D{self.D}-k{self.k}-{str(self.dtype)[6:]}"

    def arguments(self, mean: float = 0.3) -> Score:
        """Logits of size 1, of tokens of different lengths."""
        make = torch.Generator().manual_seed(self.B + 10 * self.N + 100 * self.D + self.k)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make)

        hidden = mean + normal(self.B, self.N, self.D) * (0.5 + normal(self.N, 1).abs())
        return Score(
            hidden.to(self.dtype),
            normal(self.k, self.D) / max(self.D, 1) ** 0.5,
            normal(self.B, self.k),
        )


def score_cases() -> list[ScoreCase]:
    """Odd sizes, more probes than one turn, several blocks of tokens, and nothing at all."""
    sizes = ((1, 1), (7, 3), (129, 67), (256, 64), (1300, 9))
    cases = [
        ScoreCase(B=1 + (i + j) % 3, N=N, D=D, k=(1, 3, 9)[(i + j) % 3], dtype=dtype)
        for i, (D, N) in enumerate(sizes)
        for j, dtype in enumerate(DTYPES)
    ]
    return [*cases, ScoreCase(2, 0, 16, 2), ScoreCase(0, 5, 16, 2), ScoreCase(1, 150, 33, 5)]


class Moves(NamedTuple):
    """The arguments of `exit_compact_`, in its order."""

    hidden: Tensor  # [n, ...]
    out: Tensor  # [B, ...]
    order: Tensor  # [n] int64
    kept: Tensor  # [1] int64
    place: Tensor  # [n] int64

    def copy(self, device: str | None = None) -> Moves:
        """Returns a copy, hidden and out amid NaN."""
        device = device or self.hidden.device.type
        rows = [guarded(tensor.to(device)) for tensor in self[:2]]
        return Moves(*rows, *(tensor.to(device, copy=True) for tensor in self[2:]))


@dataclass(frozen=True)
class MoveCase:
    """One call of `exit_compact_`: which of n rows leave, and the shape of a row."""

    leaving: tuple[int, ...]
    n: int
    shape: tuple[int, ...] = (3, 43)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"n{self.n}-leave{len(self.leaving)}-{list(self.shape)}-{str(self.dtype)[6:]}"

    def arguments(self) -> Moves:
        """Every row of hidden and out has numbers of its own; out has two rows more."""
        make = torch.Generator().manual_seed(self.n)
        staying = [r for r in range(self.n) if r not in self.leaving]
        kept = len(staying)
        tail = iter([r for r in staying if r >= kept])
        order = [p if p in staying else next(tail) for p in range(kept)]
        return Moves(
            torch.randn(self.n, *self.shape, generator=make).to(self.dtype),
            torch.randn(self.n + 2, *self.shape, generator=make).to(self.dtype),
            torch.tensor([*order, *sorted(self.leaving)], dtype=torch.int64),
            torch.tensor([kept]),
            torch.randperm(self.n + 2, generator=make)[: self.n],
        ).copy()


def move_cases() -> list[MoveCase]:
    """None, some and all leave; rows of no, of odd and of many elements."""
    return [
        MoveCase((), 0),
        MoveCase((), 3),
        MoveCase((0, 1, 2), 3),
        MoveCase((1, 2, 4), 6, (1,)),
        MoveCase((0, 2, 3, 5, 6), 7, (), torch.bfloat16),
        MoveCase((0, 1, 6), 8, (7, 129), torch.float16),
        MoveCase((4, 5), 6, (2, 4096)),
        MoveCase((0, 1), 6, (3, 1367), torch.bfloat16),
        MoveCase((0, 2), 4, (5, 0)),
    ]
