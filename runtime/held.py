"""The last outputs of one model call, row by row: kept to go on with where a row skips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure

from sidestep.runtime.upload import index, upload


@dataclass
class HeldOutput:
    """Private copies of what a model returned, in a ring of ``history`` places for every row.

    A row's ring turns only when that row is computed, so that nothing is ever moved, and rows that
    were computed at different steps share the same tensors.

    Attributes:
        shape: Of the input they belong to, batch included.
        dtype: Of that input.
        device: Of that input.
        history: Outputs kept of each row.
        rings: What the model returned, but every tensor of it ``[history * batch, ...]``: place
            ``p`` of row ``i`` is at ``p * batch + i``.
        places: ``[batch]``, the place of the newest output.
        steps: ``[batch]``, the steps that the outputs were computed at, newest first.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    history: int
    rings: Any
    places: list[int]
    steps: list[list[int]]

    @classmethod
    def of(
        cls, sample: Tensor | None, output: Any, history: int = 1, step: int = 0
    ) -> HeldOutput | None:
        """Begins with the output of step ``step``; None where it cannot be cut into rows."""
        if sample is None:
            return None
        batch, leaves = len(sample), tree_leaves(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        opaque = [leaf for leaf in leaves if not isinstance(leaf, Tensor) and leaf is not None]
        if not tensors or opaque or any(t.ndim == 0 or len(t) != batch for t in tensors):
            return None
        # `cat` keeps channels_last; the places that are not filled yet are never read.
        rings = tree_map_only(Tensor, lambda t: torch.cat([t.detach()] * history), output)
        steps = [[step] for _ in range(batch)]
        return cls(sample.shape, sample.dtype, sample.device, history, rings, [0] * batch, steps)

    def fits(self, sample: Tensor, output: Any = None) -> bool:
        """Whether ``sample``, and ``output`` if given, are like those that are held."""
        kind = (self.shape, self.dtype, self.device)
        if kind != (sample.shape, sample.dtype, sample.device):
            return False
        if output is None:
            return True
        same = [(new.shape[1:], new.dtype) for new in _tensors(output)] == [
            (ring.shape[1:], ring.dtype) for ring in _tensors(self.rings)
        ]
        return same and tree_structure(output) == tree_structure(self.rings)

    def has(self, row: int, rows: int, steps: Sequence[int]) -> bool:
        """Whether every branch of a row was last computed at ``steps``, newest first."""
        return all(
            self.steps[i][: len(steps)] == list(steps) for i in range(row, len(self.steps), rows)
        )

    def adds(self, offset: Tensor) -> bool:
        """Whether there is an output that an offset shaped like the latents can be added to."""
        return any(adds_to(offset, ring) for ring in _tensors(self.rings))

    def put(self, part: Any, rows: Sequence[int], step: int) -> None:
        """Takes ``part``, the output of the rows at step ``step``.

        Raises:
            RuntimeError: The model did not return as many rows as it was given.
        """
        came = [list(leaf.shape) for leaf in _tensors(part)]
        expected = [[len(rows), *ring.shape[1:]] for ring in _tensors(self.rings)]
        if came != expected:
            raise RuntimeError(
                f"the model was given {len(rows)} of {self.shape[0]} rows and returned "
                f"{came}, expected {expected}"
            )
        for row in rows:
            self.places[row] = (self.places[row] + 1) % self.history
            self.steps[row] = [step, *self.steps[row][: self.history - 1]]
        fresh = _tensors(part)
        for ring, new in zip(_tensors(self.rings), fresh, strict=True):
            ring[self._at(rows, 0, ring.device)] = new.detach()

    def reuse(
        self,
        weights: Mapping[int, Sequence[float]],
        offset: Tensor | None = None,  # [batch, C, ...]
    ) -> Any:
        """The whole output for the host: the newest of every row, or what is made of the last few.

        A row with weights gets ``offset + sum_i weights[i] * (its i-th newest output)``, formed in
        fp32 or wider and given back in the output's own dtype; an integer stays the newest. The
        tensors are the caller's: writing into them does not reach what is held.

        Args:
            weights: By row, newest first, no more than it has outputs.
            offset: Added to the first ``C`` channels of those rows.
        """
        everyone = range(len(self.places))
        output = tree_map_only(
            Tensor, lambda ring: _copy(ring, self._at(everyone, 0, ring.device)), self.rings
        )
        for count in sorted({len(of_row) for of_row in weights.values()}):
            rows = [row for row, of_row in weights.items() if len(of_row) == count]
            shares = [[float(share) for share in weights[row]] for row in rows]
            for ring, target in zip(_tensors(self.rings), _tensors(output), strict=True):
                if not ring.is_floating_point():
                    continue
                total = self._combine(ring, rows, upload(shares, torch.float32, ring.device))
                if offset is not None and adds_to(offset, total):
                    total[:, : offset.shape[1]] += offset[index(rows, offset.device)].to(total)
                target[index(rows, target.device)] = total.to(target.dtype)
        return output

    def _combine(
        self,
        ring: Tensor,  # [history * batch, ...]
        rows: Sequence[int],
        shares: Tensor,  # [n, count]
    ) -> Tensor:  # [n, ...]
        """The weighted outputs of ``rows``, newest first."""
        wide = torch.promote_types(ring.dtype, torch.float32)
        terms = [
            ring[self._at(rows, age, ring.device)].to(wide)
            * shares[:, age].view(-1, *[1] * (ring.ndim - 1))
            for age in range(shares.shape[1])
        ]
        return sum(terms[1:], start=terms[0])

    def _at(self, rows: Sequence[int], age: int, device: torch.device) -> slice | Tensor:
        """Where the rings keep the outputs of ``rows`` that are ``age`` computed ones back."""
        batch = len(self.places)
        return index([(self.places[i] - age) % self.history * batch + i for i in rows], device)


def adds_to(
    offset: Tensor,  # [rows, C, ...]
    output: Tensor,  # [n, C or more, ...]
) -> bool:
    """Whether an offset shaped like the latents belongs to this output."""
    return (
        offset.ndim == output.ndim > 1
        and offset.shape[1] <= output.shape[1]
        and offset.shape[2:] == output.shape[2:]
    )


def _copy(ring: Tensor, at: slice | Tensor) -> Tensor:
    """The rows, not to be shared; taking them by an index has copied them."""
    return ring[at].clone() if isinstance(at, slice) else ring[at]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
