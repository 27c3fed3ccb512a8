"""SRDS inside the engine: the ends of all blocks of every image, and what becomes of them.

`csrc/core/parareal.cpp` says which boundary can be formed and which chain of steps starts from it;
here are the tensors.  A chain is a row of the engine that begins and ends at the ends of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sidestep.kernels import difference_gram, parareal_correct_
from sidestep.kernels.core import PararealSchedule
from sidestep.runtime.methods.coarse import COARSE
from sidestep.runtime.methods.srds import SRDS, Stop
from sidestep.runtime.plan import Plan
from sidestep.runtime.summary import Summary
from sidestep.runtime.upload import upload

if TYPE_CHECKING:
    from sidestep.runtime.engine_rows import Row

Key = tuple[int, int]
"""A block, counted from 1, and an iterate."""

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
        residuals: By boundary, ``[2]`` fp32: mean squares of its change, and of itself.
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
    residuals: dict[Key, Tensor] = field(default_factory=dict)
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

    def finish(self, iterate: int) -> None:
        """That iterate is its result, and all that is kept."""
        self.iterations = iterate
        self.latents = {p: x for p, x in self.latents.items() if p == iterate}
        for kept in (self.boundaries, self.inputs, self.fine, self.residuals):
            kept.clear()

    def forget(self, iterate: int) -> None:
        """That iterate does not suffice: what only it was judged by is let go."""
        self.latents = {p: x for p, x in self.latents.items() if p > iterate}
        self.residuals = {key: r for key, r in self.residuals.items() if key[1] >= iterate}


@dataclass(frozen=True, eq=False)
class Start:
    """A chain that can start, and where from: ``state`` is ``[R, D]`` fp32."""

    image: Image
    chain: Chain
    state: Tensor


class Parareal:
    """The images of one request.

    Attributes:
        settings: Of the method.
        bounds: ``[B + 1]`` of the blocks.
        most: Most iterations.
        stop: Says which of them have converged.
        images: All of them, in order.
        first: The chain that each of them starts with.
    """

    def __init__(
        self,
        settings: SRDS,
        plan: Plan,
        count: int,
        device: torch.device,
        schedule: type[PararealSchedule],
    ) -> None:
        """Cuts the plan into blocks.

        Args:
            settings: Of the method.
            plan: The sampler.
            count: Images.
            device: Of the state.
            schedule: Of each image.

        Raises:
            ValueError: The plan cannot be cut so.
        """
        settings.check(plan)
        self.settings, self.bounds = settings, settings.bounds(len(plan))
        self.blocks = len(self.bounds) - 1
        self.most = settings.iterations(self.blocks)
        self._registers = plan.registers
        self._coarse = COARSE[settings.coarse](plan, self.bounds, device)
        self.stop = Stop(settings, self.bounds)
        self.images = [Image(i, schedule(self.bounds, self.most)) for i in range(count)]
        self._news: dict[int, list[Image]] = {}
        (self.first, *_) = [self.chain(*image.schedule.begin()) for image in self.images]

    def chain(self, block: int, iterate: int, first: int, steps: int) -> Chain:
        """What the schedule says of a chain."""
        return Chain(block, iterate, first, steps, first + steps == self.bounds[block])

    def advance(
        self,
        begun: Sequence[tuple[Row, Tensor]],  # [R' + 1, D] each
        ended: Sequence[tuple[Row, Tensor]],  # [R', D] each
    ) -> list[Start]:
        """Takes in chains that have taken their first step, and chains that have taken their last.

        Args:
            begun: The registers before that step, R' of them, and the model's output there.
            ended: The registers after it.

        Returns:
            The chains that start by it.
        """
        formed: list[tuple[Image, Boundary]] = []
        for row, inputs in begun:
            image, chain = self.chain_of(row)
            image.inputs[chain.key] = torch.cat([inputs[: self._registers], inputs[-1:]])
            formed += [(image, each) for each in image.schedule.coarse(*chain.key)]
        for row, state in ended:
            image, chain = self.chain_of(row)
            if chain.whole:
                image.fine[chain.key] = state[: self._registers]
                formed += [(image, each) for each in image.schedule.ended(*chain.key)]
        starts = []
        for turn in _turns(formed):
            self._form(turn)
            for image, (block, _, _, next_chain) in turn:
                if next_chain is not None:
                    state = image.boundaries[block]
                    starts.append(Start(image, self.chain(*next_chain), state))
        return starts

    def news(self) -> dict[int, list[Image]]:
        """By iterate, the images whose last boundary has come since the last call."""
        news, self._news = self._news, {}
        return news

    def chain_of(self, row: Row) -> tuple[Image, Chain]:
        """The image of a row, and the chain that it is."""
        assert row.chain is not None
        return self.images[row.index], row.chain

    def _form(self, turn: Sequence[tuple[Image, Boundary]]) -> None:
        """x_i^p of all these, in one go."""
        like = next(iter(turn[0][0].inputs.values()))
        nothing, state = torch.zeros_like(like), torch.zeros_like(like[:-1])
        before, fine, new, old = [], [], [], []
        for image, (block, iterate, exact, _) in turn:
            key, last = (block, iterate), (block, iterate - 1)
            before.append(image.boundaries.get(block, state))
            fine.append(state if iterate == 0 else image.fine.pop(last))
            old.append(nothing if iterate == 0 else image.inputs.pop(last))
            new.append(old[-1] if exact else image.inputs[key])
        change = torch.stack(new), torch.stack(old)
        boundary, ends = torch.stack(before), torch.stack(fine)
        last_ones = boundary.clone() if self.settings.allowed == 0 else None
        changed = parareal_correct_(boundary, ends, *change, self._coefficients(turn, *change))
        if last_ones is not None:  # no bit of any register may differ, however small its square
            changed[:, 0] += (boundary != last_ones).flatten(1).any(1) * 1e-30
        for (image, (block, iterate, _, _)), x, residual in zip(
            turn, boundary, changed, strict=True
        ):
            image.boundaries[block] = x
            image.residuals[block, iterate] = residual
            if block == self.blocks:
                image.latents[iterate] = x[0]
                self._news.setdefault(iterate, []).append(image)

    def _coefficients(
        self,
        turn: Sequence[tuple[Image, Boundary]],
        new: Tensor,  # [n, R + 1, D]
        old: Tensor,  # [n, R + 1, D]
    ) -> Tensor:  # [n, R, R + 1]
        """The coarse solver's: of the start in iterate 0, of a change later."""
        blocks = [block - 1 for _, (block, *_) in turn]
        gram = difference_gram(new, old)
        later = upload([iterate > 0 for _, (_, iterate, *_) in turn], torch.bool, new.device)
        changes = self._coarse.correction(blocks, gram)
        return torch.where(later[:, None, None], changes, self._coarse.start(blocks)).float()

    def judge(self) -> list[Image]:
        """The images that need no more iterations, with their results in ``latents[iterations]``.

        Raises:
            FloatingPointError: The state of an image is not finite.
        """
        finished = []
        while due := [image for image in self.images if self._is_due(image)]:
            for image, residuals in zip(due, self._read(due), strict=True):
                iterate = image.judged = image.judged + 1
                image.error = self.stop.error(residuals, iterate)
                if self.stop.enough(image.error) or iterate == self.most:
                    image.finish(iterate)
                    finished.append(image)
                else:
                    image.forget(iterate)
        return finished

    def _is_due(self, image: Image) -> bool:
        """Whether all is known that tells whether the next iterate suffices."""
        iterate = image.judged + 1
        needed = self.stop.needed(iterate)
        known = not needed or (needed, iterate + 1) in image.residuals
        return not image.finished and iterate in image.latents and known

    def _read(self, images: Sequence[Image]) -> list[np.ndarray]:  # [most + 2, B + 1] each
        """Root mean squares of the changes, by iterate and block: one read from the device.

        Those that the schedule of unlimited width knows by now, so that the result does not depend
        on the width: of the next iterate the boundaries that are needed only.
        """
        keys: list[tuple[Image, Key]] = []
        for image in images:
            coming = image.judged + 2
            needed = self.stop.needed(coming - 1)
            keys += [
                (image, key)
                for key in image.residuals
                if key[1] < coming or (key[1] == coming and key[0] <= needed)
            ]
        squares = torch.stack([image.residuals[key] for image, key in keys]).tolist()
        found = {image: np.zeros((self.most + 2, self.blocks + 1)) for image in images}
        for (image, (block, iterate)), (change, size) in zip(keys, squares, strict=True):
            if not math.isfinite(size):
                raise FloatingPointError(
                    f"row {image.index}, block {block} of {self.blocks} in iteration {iterate}: "
                    "the latents are not finite"
                )
            found[image][iterate, block] = math.sqrt(change)
        return [found[image] for image in images]

    def summary(self, ticks: int) -> Summary:
        """What it has cost so far.

        Args:
            ticks: Model calls that the request had a row in.
        """
        images = self.images
        return Summary(
            method=repr(self.settings),
            nfe=tuple(float(image.evaluations) for image in images),
            ticks=ticks,
            steps=self.bounds[-1],
            iterations=tuple(image.iterations for image in images),
            errors=tuple(image.error for image in images),
            image_ticks=tuple(len(image.tickets) for image in images),
            note=self._note(),
        )

    def _note(self) -> str:
        """Which images ended before they had converged; empty if none."""
        short = [i.index for i in self.images if i.finished and not self.stop.enough(i.error)]
        if not short:
            return ""
        return (
            f"images {', '.join(map(str, short))} ended after max_iterations={self.most} above the "
            f"tolerance of {self.stop.tolerance:g}"
        )


def _turns(
    formed: Sequence[tuple[Image, Boundary]],
) -> Iterator[list[tuple[Image, Boundary]]]:
    """What can be formed together: of one block one iterate after the other."""
    while formed:
        turn: list[tuple[Image, Boundary]] = []
        later: list[tuple[Image, Boundary]] = []
        seen: set[tuple[int, int]] = set()
        for image, boundary in formed:
            place = (image.index, boundary[0])
            (later if place in seen else turn).append((image, boundary))
            seen.add(place)
        yield turn
        formed = later
