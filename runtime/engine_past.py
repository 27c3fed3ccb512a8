"""What is kept of an image for a coarse solver that looks back to the block before.

A value of its own at the start of every block (`Hold.value`) goes along with the boundary to the
block after it, so that it is there when that one begins, in this process or in another one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sidestep.runtime.methods.coarse import Hold

Key = tuple[int, int]
"""A block, counted from 1, and an iterate."""


@dataclass(eq=False)
class Past:
    """Of one image; empty for a coarse solver that does not look back.

    Attributes:
        values: By chain, ``[D]`` fp32: the value at its start, until the last boundary after it.
        before: By chain, ``[D]`` fp32: the value at the start of the block before, until it begins.
        guesses: By chain of iterate 0, ``[R + 1, D]`` fp32: what the first guess acts on.
    """

    values: dict[Key, Tensor] = field(default_factory=dict)
    before: dict[Key, Tensor] = field(default_factory=dict)
    guesses: dict[Key, Tensor] = field(default_factory=dict)

    def begin(
        self,
        coarse: Hold,
        key: Key,
        inputs: Tensor,  # [R + 1, D]
    ) -> Tensor:  # [R + 1, D]
        """A chain has taken its first step: what its correction acts on.

        Args:
            coarse: The solver, which looks back.
            key: Of the chain.
            inputs: The registers before that step, and the model's output there.
        """
        block, iterate = key
        value = self.values[key] = coarse.value(block - 1, inputs[0], inputs[-1])
        output = coarse.ahead(block - 1, value, self.before.pop(key, None))
        acted = torch.cat([inputs[:-1], output[None]])
        if coarse.throughout:
            return acted
        if iterate == 0:
            self.guesses[key] = acted
        return inputs

    def share(self, source: Key, key: Key) -> None:
        """A chain that is not run has the value of the one that serves for it."""
        if source != key:
            self.before.pop(key, None)
            if source in self.values:
                self.values[key] = self.values[source]

    def hand_on(self, block: int, iterate: int, exact: bool, goes_on: bool) -> None:
        """A boundary has been formed: its block's value goes to the chain that starts from it.

        Args:
            block: That ends there.
            iterate: Of the boundary.
            exact: Whether the start of the block is that of the iterate before.
            goes_on: Whether a chain starts from it.
        """
        last = (block, iterate - 1)
        if self.values and goes_on:
            self.before[block + 1, iterate] = self.values[last if exact else (block, iterate)]
        self.values.pop(last, None)

    def clear(self) -> None:
        """The image has its result."""
        for kept in (self.values, self.before, self.guesses):
            kept.clear()
