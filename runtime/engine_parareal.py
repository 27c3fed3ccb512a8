"""SRDS inside the engine: the ends of all blocks of every image, and what becomes of them.

`csrc/core/parareal.cpp` says which boundary can be formed and which chain of steps starts from it;
here are the tensors.  What is kept of each image is in `engine_images`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sidestep.kernels import difference_gram, parareal_correct_
from sidestep.kernels.core import PararealSchedule
from sidestep.runtime import ranges
from sidestep.runtime.engine_images import Boundary, Chain, Image, Start
from sidestep.runtime.methods.coarse import COARSE
from sidestep.runtime.methods.srds import SRDS, Stop
from sidestep.runtime.plan import Plan
from sidestep.runtime.summary import Summary
from sidestep.runtime.upload import upload

if TYPE_CHECKING:
    from sidestep.runtime.engine_rows import Row


class Parareal:
    """The images of one request.

    Attributes:
        settings: Of the method.
        bounds: ``[B + 1]`` of the blocks.
        most: Most iterations.
        stop: Says which of them have converged.
        images: All of them, in order.
        first: The chain that each of them starts with.
        elsewhere: Whether the block after a boundary is with another rank, which is to be told of
            every start.
    """

    elsewhere = False

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
        self.settings, self.bounds = settings, settings.bounds(plan)
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
            The chains that start by it, ``moved`` ones only unless `elsewhere`.
        """
        formed: list[tuple[Image, Boundary]] = []
        for row, inputs in begun:
            image, chain = self.chain_of(row)
            inputs = torch.cat([inputs[: self._registers], inputs[-1:]])
            if self._coarse.looks_back:
                inputs = image.past.begin(self._coarse, chain.key, inputs)
            formed += [(image, each) for each in image.begun(chain, inputs)]
        for row, state in ended:
            image, chain = self.chain_of(row)
            formed += [(image, each) for each in image.ended(chain, state[: self._registers])]
        return self._follow(formed)

    def share(self, image: Image, chain: Chain) -> list[Start]:
        """Takes in a chain whose start has not moved; otherwise as `advance`."""
        return self._follow([(image, each) for each in image.share(chain)])

    def _follow(self, formed: list[tuple[Image, Boundary]]) -> list[Start]:
        """Forms the boundaries, and those that follow from starts that have not moved."""
        starts = []
        while formed:
            turn, formed = _turn(formed)
            with ranges.within("correct"):
                moves = self._form(turn)
            for (image, (block, _, _, started)), moved in zip(turn, moves, strict=True):
                if started is None:
                    continue
                chain = self.chain(*started)
                if moved or self.elsewhere:
                    starts.append(Start(image, chain, image.boundaries[block], moved))
                else:
                    formed += [(image, each) for each in image.share(chain)]
        return starts

    def news(self) -> dict[int, list[Image]]:
        """By iterate, the images whose last boundary has come since the last call."""
        news, self._news = self._news, {}
        return news

    def chain_of(self, row: Row) -> tuple[Image, Chain]:
        """The image of a row, and the chain that it is."""
        assert row.chain is not None
        return self.images[row.index], row.chain

    def _form(self, turn: Sequence[tuple[Image, Boundary]]) -> list[bool]:
        """x_i^p of all these, in one go: whether each has moved. One read from the device."""
        like = next(iter(turn[0][0].inputs.values()))
        nothing, state = torch.zeros_like(like), torch.zeros_like(like[:-1])
        before, fine, new, old = [], [], [], []
        for image, (block, iterate, exact, next_chain) in turn:
            key, last = (block, iterate), (block, iterate - 1)
            before.append(image.boundaries.get(block, state))
            fine.append(state if iterate == 0 else image.fine.pop(last))
            old.append(nothing if iterate == 0 else image.inputs.pop(last))
            acted = old[-1] if exact else image.inputs[key]
            new.append(image.past.guesses.pop(key, acted))
            image.past.hand_on(block, iterate, exact, next_chain is not None)
        change = torch.stack(new), torch.stack(old)
        boundary, ends = torch.stack(before), torch.stack(fine)
        last_ones = boundary.clone() if self.settings.allowed == 0 else None
        changed = parareal_correct_(boundary, ends, *change, self._coefficients(turn, *change))
        if last_ones is not None:  # no bit of any register may differ, however small its square
            changed[:, 0] += (boundary != last_ones).flatten(1).any(1) * 1e-30
        moved = []
        for (image, (block, iterate, _, _)), x, (change, size) in zip(
            turn, boundary, changed.tolist(), strict=True
        ):
            image.residuals[block, iterate] = change, size
            moved.append(iterate == 0 or self.stop.moved(math.sqrt(change), iterate))
            if moved[-1]:
                image.boundaries[block] = x.clone()  # alone, without the others of this turn
            if block == self.blocks:
                image.latents[iterate] = x[0]
                self._news.setdefault(iterate, []).append(image)
        return moved

    def _coefficients(
        self,
        turn: Sequence[tuple[Image, Boundary]],
        new: Tensor,  # [n, R + 1, D]
        old: Tensor,  # [n, R + 1, D]
    ) -> Tensor:  # [n, R, R + 1]
        """The coarse solver's: of the start in iterate 0, of a change later."""
        blocks = [block - 1 for _, (block, *_) in turn]
        gram = difference_gram(new, old)
        iterates = upload([iterate for _, (_, iterate, *_) in turn], torch.int64, new.device)
        changes = self._coarse.correction(blocks, gram)
        if self.settings.drafts:  # the old outputs of iterate 1 are no whole ones
            first = (iterates == 1)[:, None, None]
            changes = torch.where(first, self._coarse.held(blocks), changes)
        later = (iterates > 0)[:, None, None]
        return torch.where(later, changes, self._coarse.start(blocks)).float()

    def judge(self) -> list[Image]:
        """The images that need no more iterations, with their results in ``latents[iterations]``.

        Raises:
            FloatingPointError: The state of an image is not finite.
        """
        finished = []
        while due := [image for image in self.images if self._is_due(image)]:
            for image in due:
                residuals = self._known(image)
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

    def _known(self, image: Image) -> np.ndarray:  # [most + 2, B + 1]
        """Root mean squares of the changes, by iterate and block.

        Those that the schedule of unlimited width knows by now, so that the result does not depend
        on the width: of the next iterate the boundaries that are needed only.
        """
        coming = image.judged + 2
        needed = self.stop.needed(coming - 1)
        found = np.zeros((self.most + 2, self.blocks + 1))
        for (block, iterate), (change, size) in image.residuals.items():
            if iterate > coming or (iterate == coming and block > needed):
                continue
            if not math.isfinite(size):
                raise FloatingPointError(
                    f"row {image.index}, block {block} of {self.blocks} in iteration {iterate}: "
                    "the latents are not finite"
                )
            found[iterate, block] = math.sqrt(change)
        return found

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


def _turn(
    formed: Sequence[tuple[Image, Boundary]],
) -> tuple[list[tuple[Image, Boundary]], list[tuple[Image, Boundary]]]:
    """What can be formed together, and the rest: of one block one iterate after the other."""
    turn: list[tuple[Image, Boundary]] = []
    later: list[tuple[Image, Boundary]] = []
    seen: set[tuple[int, int]] = set()
    for image, boundary in formed:
        place = (image.index, boundary[0])
        (later if place in seen else turn).append((image, boundary))
        seen.add(place)
    return turn, later
