"""What SRDS keeps of an image inside the engine: its chains, the ends of its blocks, its residuals.

A chain is a row of the engine that begins and ends at the ends of a block.  One whose start has not
moved is not run: the one before it in its block serves for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sidestep.kernels.core import PararealSchedule
from sidestep.runtime.engine_past import Key, Past

Boundary = tuple[int, int, bool, tuple[int, int, int, int] | None]
"""What the schedule lets form: block, iterate, whether it is exact, and the chain it starts."""


@dataclass(frozen=True)
class Chain:
    """The steps of one block, from the boundary before it in one iterate.

    Attributes:
        block: i, counted from 1.
        iterate: q, of the boundary i - 1 that it starts from.
        first: Its first step.
        steps: Steps it takes: 1 where only the coarse solver needs it.
        whole: Whether that is the whole block.
    """

    block: int
    iterate: int
    first: int
    steps: int
    whole: bool

    @property
    def key(self) -> Key:
        """Of it among the chains of its image."""
        return self.block, self.iterate


@dataclass(eq=False)
class Image:
    """One image: its schedule and what is kept for it.

    Attributes:
        index: Its place in the request.
        schedule: What can be formed.
        boundaries: By block, ``[R, D]`` fp32: the end of each block in its latest iterate.
        inputs: By chain, ``[R + 1, D]`` fp32: the state it starts from, and the output there.
        fine: By chain, ``[R, D]`` fp32: where it ended.
        past: What a coarse solver keeps that looks back.
        sources: By chain that does not run: the one that runs in its place.
        residuals: By boundary, mean squares of its change, and of itself.
        latents: By iterate, ``[D]`` fp32: x_B^p, until it is judged.
        judged: Iterates of which it is known whether they suffice.
        iterations: The iterate that it ended with, -1 before.
        error: Estimated root mean square of the error of the last judged one.
        evaluations: Of the model.
        tickets: The batches it had a row in.
    """

    index: int
    schedule: PararealSchedule
    boundaries: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[Key, Tensor] = field(default_factory=dict)
    fine: dict[Key, Tensor] = field(default_factory=dict)
    past: Past = field(default_factory=Past)
    sources: dict[Key, Key] = field(default_factory=dict)
    residuals: dict[Key, tuple[float, float]] = field(default_factory=dict)
    latents: dict[int, Tensor] = field(default_factory=dict)
    judged: int = 0
    iterations: int = -1
    error: float = float("inf")
    evaluations: int = 0
    tickets: set[int] = field(default_factory=set)

    @property
    def finished(self) -> bool:
        """Whether it has its result."""
        return self.iterations >= 0

    def count_call(self, ticket: int) -> None:
        """One evaluation of the model more, in that batch."""
        self.evaluations += 1
        self.tickets.add(ticket)

    def begun(self, chain: Chain, inputs: Tensor) -> list[Boundary]:
        """A chain has taken its first step, and those that share it: what can be formed."""
        formed = []
        for iterate in self._sharing(chain):
            self.inputs[chain.block, iterate] = inputs
            self.past.share(chain.key, (chain.block, iterate))
            formed += self.schedule.coarse(chain.block, iterate)
        return formed

    def ended(self, chain: Chain, state: Tensor) -> list[Boundary]:
        """A chain has taken its last step, and those that share it: what can be formed."""
        formed = []
        for iterate in self._sharing(chain) if chain.whole else ():
            self.fine[chain.block, iterate] = state
            formed += self.schedule.ended(chain.block, iterate)
        return formed

    def share(self, chain: Chain) -> list[Boundary]:
        """A chain starts where the one before it did, which serves for both: what can be formed."""
        formed, before = [], (chain.block, chain.iterate - 1)
        self.sources[chain.key] = self.sources.get(before, before)
        if before in self.inputs:
            self.inputs[chain.key] = self.inputs[before]
            self.past.share(before, chain.key)
            formed += self.schedule.coarse(*chain.key)
        if before in self.fine:
            self.fine[chain.key] = self.fine[before]
            formed += self.schedule.ended(*chain.key)
        return formed

    def _sharing(self, chain: Chain) -> list[int]:
        """The iterate of a chain that runs, and those of the chains that it serves for as well."""
        sharing = [p for (_, p), source in self.sources.items() if source == chain.key]
        return [chain.iterate, *sharing]

    def finish(self, iterate: int) -> None:
        """That iterate is its result, and all that is kept."""
        self.iterations = iterate
        self.latents = {p: x for p, x in self.latents.items() if p == iterate}
        for kept in (self.boundaries, self.inputs, self.fine, self.sources, self.residuals):
            kept.clear()
        self.past.clear()

    def forget(self, iterate: int) -> None:
        """That iterate does not suffice: what only it was judged by is let go."""
        self.latents = {p: x for p, x in self.latents.items() if p > iterate}
        self.residuals = {
            (i, p): r for (i, p), r in self.residuals.items() if p >= iterate or i == p
        }


@dataclass(frozen=True, eq=False)
class Start:
    """A chain that can start, and where from.

    Attributes:
        state: ``[R, D]`` fp32.
        moved: False where the one before it in its block has started from there, and serves for it.
    """

    image: Image
    chain: Chain
    state: Tensor
    moved: bool = True
