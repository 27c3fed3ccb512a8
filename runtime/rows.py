"""Rows of a model's arguments and outputs: gathering them, holding them, scattering them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_Tree = TypeVar("_Tree")
_SAMPLE_NAMES = ("sample", "hidden_states", "x")


def find_sample(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The model's main input ``[batch, ...]``: UNets take it first, transformers by keyword."""
    named = [kwargs.get(name) for name in _SAMPLE_NAMES]
    for candidate in (*args[:1], *named):
        if isinstance(candidate, Tensor) and candidate.ndim > 0:
            return candidate
    return None


def take_rows(
    tree: _Tree,
    index: Tensor,  # [n] int64
    batch: int,
) -> _Tree:
    """``tree`` with the rows ``index`` of every tensor ``[batch, ...]`` in it, the rest as it is.

    Lists, tuples, dictionaries and the output classes that diffusers registers are entered.
    """

    def take(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != batch:
            return tensor
        return tensor[index.to(tensor.device)]  # keeps channels_last, index_select does not

    return tree_map_only(Tensor, take, tree)


@dataclass
class HeldOutput:
    """The last output of a model call, a private copy, every tensor of it ``[batch, ...]``.

    Attributes:
        shape: Of the input it belongs to, batch included.
        dtype: Of that input.
        device: Of that input.
        tree: The output, in the structure the model returned.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    tree: Any

    @classmethod
    def of(cls, sample: Tensor | None, output: Any) -> HeldOutput | None:
        """A copy to reuse, or None where an output cannot be cut into rows."""
        if sample is None:
            return None
        leaves = tree_leaves(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        opaque = [leaf for leaf in leaves if not isinstance(leaf, Tensor) and leaf is not None]
        if not tensors or opaque or any(t.ndim == 0 or len(t) != len(sample) for t in tensors):
            return None
        return cls(sample.shape, sample.dtype, sample.device, _clone(output))

    def fits(self, sample: Tensor) -> bool:
        """Whether ``sample`` is an input like the one this output belongs to."""
        return (self.shape, self.dtype, self.device) == (sample.shape, sample.dtype, sample.device)

    def put(
        self,
        part: Any,
        index: Tensor,  # [n] int64
    ) -> None:
        """Writes ``part``, the output for the rows ``index``, into this one.

        Raises:
            RuntimeError: The model did not return as many rows as it was given.
        """
        whole = [leaf for leaf in tree_leaves(self.tree) if isinstance(leaf, Tensor)]
        fresh = [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)]
        came = [list(leaf.shape) for leaf in fresh]
        expected = [[len(index), *leaf.shape[1:]] for leaf in whole]
        if came != expected:
            raise RuntimeError(
                f"the model was given {len(index)} of {self.shape[0]} rows and returned "
                f"{came}, expected {expected}"
            )
        for target, rows in zip(whole, fresh, strict=True):
            target[index.to(target.device)] = rows.detach()

    def copy(self) -> Any:
        """The whole output, for a caller who may write into it."""
        return _clone(self.tree)


def _clone(tree: _Tree) -> _Tree:
    return tree_map_only(Tensor, lambda t: t.detach().clone(), tree)
