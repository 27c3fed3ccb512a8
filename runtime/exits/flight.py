"""One call of a model that rows leave on the way: they are out of the batch from there on.

After block i the rule says which rows leave. Their hidden states are translated for the model's
head and put aside; the others are gathered, in every stream and with every argument that belongs to
a row, and go on as a smaller batch. After the last block all rows are put back in their places, and
the model's own head runs once, over all of them. Nothing here knows what is inside a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sidestep.runtime.exits.layouts import HIDDEN, Blocks
from sidestep.runtime.upload import upload


class Passage(Protocol):
    """What stands in the way of every block of a model during one call."""

    def through(
        self,
        index: int,
        blocks: Blocks,
        block: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Stands for ``block(*args, **kwargs)``, the block being number ``index`` of the model."""


class Gate(Protocol):
    """Decides who leaves, and translates for the head."""

    def leave(
        self,
        index: int,
        hidden: Tensor,  # [n, tokens, width]
        places: Sequence[int],  # [n]
    ) -> Sequence[bool] | None:  # [n]
        """Which of the rows that have passed block ``index`` go no further; None for none."""

    def translate(self, index: int, hidden: Tensor) -> Tensor:
        """The hidden states that the head is to read in place of those after block ``index``."""

    def land(self, hidden: Tensor) -> None:  # [n, tokens, width]
        """All rows of the call have passed the last block."""


class Flight:
    """One call, from the first block to the last.

    Attributes:
        depths: ``[batch]`` blocks that each row has passed, once the call is over.
    """

    def __init__(self, batch: int, depth: int, gate: Gate) -> None:
        """Nobody has left yet.

        Args:
            batch: Rows of the call.
            depth: Blocks of the model.
            gate: Asked after every block but the last.
        """
        self.depths = [depth] * batch
        self._depth = depth
        self._gate = gate
        self._places = list(range(batch))  # of the rows that are still in the batch
        self._index: Tensor | None = None  # the same on the device, once somebody has left
        self._aside: list[tuple[list[int], Tensor]] = []  # places, translated hidden states
        self._taken: dict[str, tuple[Tensor, Tensor]] = {}  # arguments, whole and for the present

    def through(
        self,
        index: int,
        blocks: Blocks,
        block: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Runs a block for the rows that are left, and lets some of them leave after it."""
        if self._index is None and self._places:
            output = block(*args, **kwargs)
        else:
            given = blocks.named(args, kwargs)
            if not self._places:  # what the last block gave is handed on as it came
                output = blocks.output(given)
            else:
                given |= {name: self._take(name, given.get(name)) for name in blocks.per_row}
                output = block(**given)
        if index == self._depth - 1:
            return self._land(blocks, output)
        if not self._places:
            return output
        streams = blocks.streams(output)
        hidden = streams[HIDDEN]
        assert hidden is not None
        leaving = self._gate.leave(index, hidden, self._places)
        if leaving is None or not any(leaving):
            return output
        return blocks.output(self._part(index, streams, hidden, leaving))

    def _part(
        self,
        index: int,
        streams: dict[str, Tensor | None],
        hidden: Tensor,  # [n, tokens, width]
        leaving: Sequence[bool],  # [n]
    ) -> dict[str, Tensor | None]:
        """Puts those aside that leave; the streams of the others."""
        gone = [place for place, leaves in zip(self._places, leaving, strict=True) if leaves]
        for place in gone:
            self.depths[place] = index + 1
        if len(gone) == len(self._places):
            hidden = self._gate.translate(index, hidden)
            self._aside.append((gone, hidden))
            self._places = []
            return {**streams, HIDDEN: hidden}
        numbers = range(len(leaving))
        out = upload([i for i in numbers if leaving[i]], torch.int64, hidden.device)
        stay = upload([i for i in numbers if not leaving[i]], torch.int64, hidden.device)
        self._aside.append((gone, self._gate.translate(index, hidden[out])))
        self._places = [p for p, leaves in zip(self._places, leaving, strict=True) if not leaves]
        self._index = upload(self._places, torch.int64, hidden.device)
        self._taken.clear()
        return {name: None if s is None else s[stay] for name, s in streams.items()}

    def _take(self, name: str, value: Tensor | None) -> Tensor | None:
        """The lines of an argument for the rows that are left; gathered once, not at every block.

        One line for all rows stays what it is.
        """
        if value is None or value.ndim == 0 or len(value) == 1:
            return value
        whole, taken = self._taken.get(name, (None, None))
        if whole is not value or taken is None:
            assert self._index is not None and len(value) == len(self.depths)
            taken = value[self._index]
            self._taken[name] = (value, taken)
        return taken

    def _land(self, blocks: Blocks, output: Any) -> Any:
        """All rows in their places again."""
        streams = blocks.streams(output)
        hidden = streams[HIDDEN]
        assert hidden is not None
        if not self._aside:
            self._gate.land(hidden)
            return output
        if not self._places and len(self._aside) == 1:
            return output
        whole = hidden.new_empty(len(self.depths), *hidden.shape[1:])
        rest = [(self._places, hidden)] if self._places else []
        for places, part in (*self._aside, *rest):
            whole.index_copy_(0, upload(places, torch.int64, hidden.device), part)
        return blocks.output({**streams, HIDDEN: whole})
