"""Which requests can share a model call, and the conditioning of a batch of their rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from sidestep.runtime.upload import select

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Conditioning:
    """What one request gives the model beside the latent and the time.

    Attributes:
        key: Equal for requests that can share a model call.
    """

    def __init__(self, tree: Any, entries: int) -> None:
        """Sorts the leaves into those with a line for each entry and all others.

        Args:
            tree: What the request holds.
            entries: G * n, branches times rows.
        """
        self.leaves, self.spec = tree_flatten(tree)
        self.by_entry = [
            isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == entries
            for leaf in self.leaves
        ]
        self.key: Hashable = (
            str(self.spec),
            tuple(map(_kind, self.leaves, self.by_entry)),
        )


def _kind(leaf: Any, by_entry: bool) -> Hashable:
    if by_entry:
        return ("entries", tuple(leaf.shape[1:]), leaf.dtype, leaf.device)
    return kind_of(leaf)


def kind_of(leaf: Any) -> Hashable:
    """Equal for leaves that are the same to a model: equal values, or the same object."""
    if is_value(leaf):
        return ("value", type(leaf), leaf)
    return ("object", id(leaf))


def is_value(leaf: Any) -> bool:
    """Whether it cannot change, and equal ones are the same."""
    return isinstance(leaf, _VALUES)


class Groups:
    """Numbers for the keys of the requests that have not ended."""

    def __init__(self) -> None:
        """Knows no key."""
        self._known: dict[Hashable, list[int]] = {}  # number and users
        self._next = 0

    def join(self, key: Hashable) -> int:
        """One request more has this key; returns its number."""
        if key not in self._known:
            self._known[key] = [self._next, 0]
            self._next += 1
        entry = self._known[key]
        entry[1] += 1
        return entry[0]

    def leave(self, key: Hashable) -> None:
        """One request less: an object that nobody holds may give its address to another."""
        self._known[key][1] -= 1
        if not self._known[key][1]:
            del self._known[key]


def gather(entries: Sequence[tuple[Conditioning, int]]) -> Any:
    """The conditioning of a batch: the line ``index`` of ``(conditioning, index)``, one by one.

    Args:
        entries: Of one group, at least one.

    Returns:
        The structure of a request's conditioning, its tensors ``[N, ...]``.
    """
    first = entries[0][0]
    pieces: list[tuple[Conditioning, list[int]]] = []
    for conditioning, index in entries:
        if pieces and pieces[-1][0] is conditioning:
            pieces[-1][1].append(index)
        else:
            pieces.append((conditioning, [index]))
    leaves = [
        torch.cat([select(part.leaves[i], lines) for part, lines in pieces]) if by_entry else leaf
        for i, (leaf, by_entry) in enumerate(zip(first.leaves, first.by_entry, strict=True))
    ]
    return tree_unflatten(leaves, first.spec)
