"""A request inside the engine: its rows, what was decided for each, and the noise they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sidestep.kernels.core import PararealSchedule
from sidestep.runtime import ranges
from sidestep.runtime.engine_conditioning import Conditioning
from sidestep.runtime.engine_images import Chain, Start
from sidestep.runtime.engine_parareal import Parareal
from sidestep.runtime.engine_request import Request, Result, Status, guidance_weights
from sidestep.runtime.methods.criterion import Criterion, Decision, Observation
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.plan_course import plan_course
from sidestep.runtime.summary import Summary, nothing_skipped
from sidestep.runtime.upload import upload


@dataclass(eq=False)
class Row:
    """One row of a live request.

    Attributes:
        live: Its request.
        index: Its place in the request.
        criterion: Decides for this row alone, because rows are at different steps; None for serial.
        chain: Of an SRDS request: the steps it takes, of one block.
        start: ``[R, D]`` fp32, what such a row begins with; None for the request's own latents, and
            once it has begun.
        slot: Its slot in the engine's state.
        position: Its place among the rows of the batch that it is in.
        step: The step it takes next.
        decision: For that step; None before the first one, and for serial rows.
        reuse: Weights of its kept outputs, newest first, where its next step skips.
        offset: ``[D]`` fp32, added to them, or None.
        kept: Outputs that are kept of it, at most ``criterion.history``.
        newest: The place of the newest in its ring.
        called: For each step taken, whether the model was called.
        reasons: For each step taken, why.
        values: For each step taken, the number that decided, ``[1]``, or None.
        range: Of the profiler, around the fine solve that it is.
    """

    live: Live
    index: int
    criterion: Criterion | None = None
    chain: Chain | None = None
    start: Tensor | None = None
    slot: int = -1
    position: int = -1
    step: int = 0
    decision: Decision | None = None
    reuse: tuple[float, ...] = (1.0,)
    offset: Tensor | None = None
    kept: int = 0
    newest: int = 0
    called: list[bool] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    values: list[Tensor | None] = field(default_factory=list)
    range: Any = None

    def enter(self) -> None:
        """The model is called for it: the beginning of a chain, if it is one and this its first."""
        if self.chain is not None and self.begins:
            first = self.chain.first
            self.range = ranges.start(f"fine[{first}:{first + self.chain.steps}]")

    def leave(self) -> None:
        """It has taken its last one, or is not needed any more."""
        ranges.end(self.range)
        self.range = None

    @property
    def line(self) -> int:
        """Of its next step in the plan table."""
        return self.live.table_lines[self.step]

    @property
    def guidance(self) -> tuple[float, ...]:
        """``[G]`` weights of its next step."""
        return self.live.guidance(self.step)

    def place(self, starts: Sequence[int], branch: int) -> int:
        """Its entry of that branch in its batch, where branch g begins at ``starts[g]``.

        Where it has no such branch its last one stands in, with weight 0.
        """
        return starts[min(branch, self.live.branches - 1)] + self.position

    @property
    def superfluous(self) -> bool:
        """Whether its image has finished without it."""
        parallel = self.live.parallel
        return parallel is not None and parallel.images[self.index].finished

    @property
    def begins(self) -> bool:
        """Whether it is a chain that has taken no step yet."""
        return self.chain is not None and self.step == self.chain.first

    @property
    def coarse(self) -> bool:
        """Whether SRDS only drafts by its next evaluation, which may be cut short."""
        parallel, chain = self.live.parallel, self.chain
        if parallel is None or chain is None:
            return False
        return chain.iterate < parallel.settings.drafts and chain.block > 1

    @property
    def ends(self) -> bool:
        """Whether it is a chain whose next step is its last."""
        return self.chain is not None and self.step == self.chain.first + self.chain.steps - 1

    @property
    def foreseen(self) -> int:
        """Steps from here on that need nobody but the model until the last has been taken."""
        request = self.live.request
        heard = self.live.parallel is None and request.on_step is not None
        if self.criterion is not None or self.begins or heard or request.noise is not None:
            return 1
        chain = self.chain
        return (self.live.steps if chain is None else chain.first + chain.steps) - self.step

    @property
    def computes(self) -> bool:
        """Whether its next step needs the model: decided so, or too little is kept to skip."""
        return self.decision is None or self.decision.compute[0] or len(self.reuse) > self.kept

    def record(self) -> None:
        """Writes down the step that is being taken, as it was decided and as it really goes."""
        decision, computes = self.decision, self.computes
        reason = "serial" if self.criterion is None else "warm-up"
        if decision is not None:
            forced = computes and not decision.compute[0]
            reason = "no output to reuse" if forced else decision.reasons[0]
        self.called.append(computes)
        self.reasons.append(reason)
        self.values.append(None if decision is None else decision.value)

    def observe(
        self,
        x: Tensor,  # [1, *shape] fp32
        x_next: Tensor,  # [1, *shape] fp32
        output: Tensor,  # [1, *shape] fp32
        step_sizes: Tensor,  # [1] fp32, on the CPU
    ) -> None:
        """Lets the criterion see the step that was just recorded, and decide the next one.

        Raises:
            ValueError: What it decided has a wrong shape.
        """
        assert self.criterion is not None
        seen = Observation(
            step=self.step,
            x=x,
            x_next=x_next,
            output=output,
            computed=[self.called[-1]],
            step_sizes=step_sizes,
        )
        decision = self.criterion.observe(seen)
        weights, offset, value = decision.weights, decision.offset, decision.value
        rows = {len(decision.compute), len(decision.reasons)}
        rows |= {len(of) for of in (weights, offset) if of is not None}
        if rows != {1} or (offset is not None and offset.shape != x.shape):
            raise ValueError(f"{decision!r} is none for one row of shape {list(x.shape)}")
        self.reuse = tuple(map(float, weights[0])) if weights and len(weights[0]) else (1.0,)
        self.offset = None if offset is None else offset.detach().to(x).reshape(-1)
        # converted here, where what goes wrong is this request's own
        self.decision = replace(
            decision,
            compute=[bool(decision.compute[0])],
            reasons=[str(decision.reasons[0])],
            value=None if value is None else value.view(1),
        )


class Live:
    """A request that has not ended.

    Attributes:
        id: Its number.
        request: What was submitted.
        count: n, its rows.
        steps: K.
        weights: ``[K, G]`` or ``[1, G]`` guidance weights.
        branches: G.
        conditioning: What it gives the model.
        table_lines: The line of each step in the plan table.
        rows: The rows that it begins with; empty of meaning once ``ended``.
        parallel: What SRDS keeps; None without it.
        tickets: The batches it had a row in.
        result: ``[n, D]`` fp32, filled as rows finish; None before the first.
        ended: Whether it has a result.
    """

    def __init__(
        self,
        request: Request,
        device: torch.device,
        schedule: type[PararealSchedule] = PararealSchedule,
    ) -> None:
        """Reads the request's guidance, conditioning and method; the engine adds the rest.

        Args:
            request: What was submitted.
            device: Of the engine.
            schedule: Of each image with SRDS; another one where some of its blocks are elsewhere.

        Raises:
            ValueError: The guidance has a wrong shape, or the method cannot run the plan.
        """
        self.id = -1
        self.request = request
        self.count, self.steps = len(request.x), len(request.plan)
        self.weights = guidance_weights(request)
        self.branches = len(self.weights[0])
        self.conditioning = Conditioning(request.conditioning, self.branches * self.count)
        self.table_lines: tuple[int, ...] = ()
        self.parallel: Parareal | None = None
        chain = None
        if isinstance(request.method, SRDS) and self.steps:
            self.parallel = Parareal(request.method, request.plan, self.count, device, schedule)
            chain = self.parallel.first
        self.rows = [Row(self, index, each, chain) for index, each in enumerate(self._begin())]
        self.tickets: set[int] = set()
        self.result: Tensor | None = None
        self.ended = False
        self._drawn = 0  # steps whose noise has been drawn
        self._tape: dict[int, Tensor] = {}  # by step, [n, D]: until the last row has taken it

    def _begin(self) -> list[Criterion | None]:
        """A criterion for each row, which knows the course of its trajectory."""
        plan, method = self.request.plan, self.request.method
        if method is None or isinstance(method, SRDS):
            return [None] * self.count
        course = replace(self.request.course or plan_course(plan), rows=1, steps=len(plan))
        criteria = [method.criterion() for _ in range(self.count)]
        for criterion in criteria:
            criterion.start(course)
        return list(criteria)

    @property
    def first(self) -> int:
        """Steps that the rows take that it begins with."""
        return self.steps if self.parallel is None else self.parallel.first.steps

    def guidance(self, step: int) -> tuple[float, ...]:
        """``[G]`` weights of that step."""
        return self.weights[step] if len(self.weights) > 1 else self.weights[0]

    def draw(self, row: Row, device: torch.device) -> Tensor | None:
        """The noise of the row's next step, ``[D]`` fp32, None where it uses none.

        The function is asked for all draws of a step, once for all rows, in order of the steps:
        one that draws from a generator replays the stream of the sampler.

        Raises:
            ValueError: It returned another shape.
        """
        plan, noise = self.request.plan, self.request.noise
        if noise is None or plan.draws is None:
            return None
        while self._drawn <= row.step:
            k = self._drawn
            used = plan.used_draw(k)
            for j in range(int(plan.draws[k])):
                z = noise(k, j) if callable(noise) else noise[k, j]
                if z.shape != self.request.x.shape:
                    raise ValueError(
                        f"noise({k}, {j}) has shape {list(z.shape)}, "
                        f"expected {list(self.request.x.shape)}"
                    )
                if j == used:
                    # rows may be at different steps, and a function may fill one tensor anew
                    kept = z.detach().to(device, torch.float32, copy=callable(noise))
                    self._tape[k] = kept.reshape(self.count, -1)
            self._drawn += 1
        tape = self._tape.get(row.step)
        return None if tape is None else tape[row.index]

    def forget_noise(self) -> None:
        """Frees the noise of the steps that all rows have taken; the chains of SRDS come back."""
        if self.parallel is not None:
            return
        slowest = min(row.step for row in self.rows)
        for k in [k for k in self._tape if k < slowest]:
            del self._tape[k]

    def follow(self, start: Start) -> Row:
        """The row of a chain that starts."""
        return Row(
            live=self,
            index=start.image.index,
            chain=start.chain,
            start=start.state,
            step=start.chain.first,
        )

    def store(
        self,
        rows: Sequence[int],  # n
        x: Tensor,  # [n, D] fp32
    ) -> None:
        """These rows have their result."""
        if self.result is None:
            self.result = torch.empty(self.count, x.shape[1], dtype=x.dtype, device=x.device)
        self.result.index_copy_(0, upload(rows, torch.int64, x.device), x)

    def count_call(self, index: int, ticket: int) -> None:
        """Row ``index`` of it was in that batch."""
        self.tickets.add(ticket)
        if self.parallel is not None:
            self.parallel.images[index].count_call(ticket)

    def summary(self) -> Summary:
        """What it cost so far, row by row."""
        if self.parallel is not None:
            return self.parallel.summary(len(self.tickets))
        known = [value for row in self.rows for value in row.values if value is not None]
        numbers = iter(torch.cat(known).tolist() if known else [])  # one read
        values = [[math.nan if v is None else next(numbers) for v in r.values] for r in self.rows]
        return Summary(
            method="serial" if self.request.method is None else repr(self.request.method),
            nfe=tuple(float(sum(row.called)) for row in self.rows),
            ticks=len(self.tickets),
            steps=self.steps,
            skip_map=tuple(tuple(row.called) for row in self.rows),
            reasons=tuple(tuple(row.reasons) for row in self.rows),
            criterion=tuple(map(tuple, values)),
            note=self._note(values),
        )

    def _note(self, values: Sequence[Sequence[float]]) -> str:
        """Why nothing was skipped; empty if something was, or if nothing could be."""
        if self.request.method is None or not all(all(row.called) for row in self.rows):
            return ""
        return nothing_skipped((row.reasons for row in self.rows), values)

    def end(self, status: Status, error: Exception | None = None) -> Result:
        """The request has ended: its result."""
        self.ended = True
        x = None
        if status == "done":
            x = self.request.x.detach().float().clone() if self.result is None else self.result
            x = x.view(self.request.x.shape)
        return Result(self.id, status, x, self.summary(), error, self.request.tag)
