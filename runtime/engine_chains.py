"""One tick of the SRDS rows of an engine: what the blocks are told, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.runtime import ranges
from sidestep.runtime.engine_images import Image, Start
from sidestep.runtime.engine_rows import Live, Row
from sidestep.runtime.engine_state import EngineState
from sidestep.runtime.engine_step import Taken, by_request
from sidestep.runtime.upload import select


@dataclass(frozen=True, eq=False)
class Followed:
    """What a tick has led to in one request.

    Attributes:
        live: The request.
        starts: Chains that can start.
        finished: Images that have their result.
    """

    live: Live
    starts: list[Start]
    finished: list[Image]


class Chains:
    """The rows of a tick that are chains, from before their step to after it."""

    def __init__(self, state: EngineState, rows: Sequence[Row]) -> None:
        """Before the step: keeps the registers of the chains that begin, for the coarse solver.

        Args:
            state: Where the rows' registers are.
            rows: All rows of the tick.
        """
        self._state = state
        self._rows = [row for row in rows if row.chain is not None]
        self._begun = [row for row in self._rows if row.begins]
        self._registers = state.states(self._begun) if self._begun else None  # [n, R', D]

    def follow(self, taken: Taken | None, end: Callable[[Live, Exception], None]) -> list[Followed]:
        """After the step: the boundaries that can be formed are, and told to those who listen.

        Args:
            taken: The step; None if no row was left for one.
            end: Ends one request with what went wrong in it; the others go on.
        """
        inputs = self._inputs(taken)
        for row in self._rows:
            if row.ends:
                row.leave()
        last = [row for row in self._rows if row.ends and not row.live.ended]
        states = dict(zip(last, self._state.states(last), strict=True)) if last else {}
        followed = []
        for live, rows in by_request(self._rows):
            parallel = live.parallel
            assert parallel is not None
            try:
                begun = [(row, inputs[row]) for row in rows if row in inputs]
                starts = parallel.advance(begun, [(r, states[r]) for r in rows if r in states])
                self._show(live)
                with ranges.within("decide"):
                    finished = parallel.judge()
            except Exception as error:
                end(live, error)
            else:
                followed.append(Followed(live, starts, finished))
        return followed

    def _inputs(self, taken: Taken | None) -> dict[Row, Tensor]:  # [R' + 1, D] each
        """What the chains that have begun began with, and the output there."""
        at = [i for i, row in enumerate(self._begun) if not row.live.ended]
        if taken is None or self._registers is None or not at:
            return {}
        begun = [self._begun[i] for i in at]
        both = [select(self._registers, at), taken.combined(begun)[:, None]]
        return dict(zip(begun, torch.cat(both, 1), strict=True))

    def _show(self, live: Live) -> None:
        """Tells the request's callback of the estimates of the result that are new."""
        parallel, on_step = live.parallel, live.request.on_step
        assert parallel is not None
        for iterate, images in sorted(parallel.news().items()):
            if on_step is not None and not live.ended:
                x = torch.stack([image.latents[iterate] for image in images])
                rows = [image.index for image in images]
                on_step(iterate, x.view(-1, *self._state.shape), rows)
