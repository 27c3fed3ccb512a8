"""SRDS on several processes, one for each device, as `torchrun` starts them.

    torch.distributed.init_process_group("gloo")
    with Ranks() as ranks:
        result = ranks.run(Request(plan, x, text, guidance=(-6.5, 7.5), method=SRDS()), model)

Every rank has the plan, the conditioning and the model, and makes the same call; the start ``x``
is read on rank 0 only.  Each owns some of the blocks of the trajectory (cyclically, for the
wavefront fills and freezes from the left) and makes their model calls; a boundary goes to the rank
of the next block as soon as it is formed.  The result is the same on all ranks, and as in one
`Engine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from sidestep.kernels.checks import MODEL_DTYPES
from sidestep.runtime.engine_check import check_request
from sidestep.runtime.engine_request import Request, Result
from sidestep.runtime.engine_rows import Live
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.ranks_calls import Calls, Helper, Model, Team, help_leader, sentence_of
from sidestep.runtime.ranks_links import Link, RankError, Wire, greeting_of
from sidestep.runtime.ranks_ring import Ring, Traffic
from sidestep.runtime.ranks_run import BlockRun, SharedSchedule

__all__ = ["RankError", "Ranks"]


class Ranks:
    """The processes of a job, or sets of them that work for themselves, as one sampler.

    Attributes:
        rank: This one's number in its set, from 0.
        size: How many they are.
        team: Ranks that evaluate a guidance branch each; 1 where every rank evaluates all.
        device: Of the state, and of what the model gets.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        guidance_ranks: int = 1,
        device: torch.device | str = "cpu",
        timeout: float = 300.0,
        nccl: bool | None = None,
    ) -> None:
        """Connects them; every process of the job makes the same call.

        Args:
            size: Ranks that work on a request together; None for all of the job. Else there are
                several such sets, of neighbours, each with its own requests.
            guidance_ranks: How many neighbours share the guidance branches of every model call:
                the G branches of a request, or 1. They come first, and size / G are left for the
                blocks.
            device: A CPU or CUDA device.
            timeout: Seconds without a word from a rank after which the run has failed; longer than
                a model call, and than the ranks are apart when they begin a run.
            nccl: Whether states travel by NCCL; None where the device is CUDA. Else by gloo,
                through the CPU, also between processes that share a device.

        Raises:
            RuntimeError: There is no process group.
            ValueError: The ranks cannot be shared out so, or a setting is out of range.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "Ranks: there is no process group, expected torch.distributed.init_process_group() "
                "in a job that torchrun has started"
            )
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"Ranks: timeout is {timeout}, expected seconds above 0")
        job = dist.get_world_size()
        self.size, self.team = int(job if size is None else size), int(guidance_ranks)
        if self.size < 1 or job % self.size or self.team < 1 or self.size % self.team:
            raise ValueError(
                f"Ranks: {job} ranks in sets of {self.size} with {self.team} for the guidance, "
                "expected divisors"
            )
        self.rank, self.device = dist.get_rank() % self.size, torch.empty(0, device=device).device
        if nccl is None:
            nccl = self.device.type == "cuda" and dist.is_nccl_available()
        self._timeout, self._groups = float(timeout), list[dist.ProcessGroup]()
        self._connect(nccl)

    def _connect(self, nccl: bool) -> None:
        """All links of the job, in the same order on all ranks, as torch wants it."""
        links: dict[tuple[int, int], Link] = {}
        me = dist.get_rank()
        for base in range(0, dist.get_world_size(), self.size):
            for one, other in self._edges(base):
                # a group to itself: gloo gives up all of a group when one wait is in vain
                words = self._group(one, other, "gloo")
                numbers = self._group(one, other, "nccl") if nccl else None
                if words is not None:
                    peer = other if me == one else one
                    links[one, other] = Link(peer, Wire(words, numbers, self.device), self._timeout)
        team, base = self.team, me - self.rank
        count, place = self.size // team, self.rank // team
        first = base + place * team
        self._ring = Ring(
            rank=me,
            place=place,
            size=count,
            before=links.get((base + (place - 1) % count * team, first)),
            after=links.get((first, base + (place + 1) % count * team)),
            timeout=self._timeout,
        )
        others = range(first + 1, first + team) if me == first else ()
        self._helpers = [Helper(links[me, other], links[other, me]) for other in others]
        self._leader = None if me == first else Helper(links[me, first], links[first, me])
        # A group is there on one rank before the other has connected: nobody closes one until then.
        dist.barrier()

    def _edges(self, base: int) -> list[tuple[int, int]]:
        """From and to, in the set that begins with that rank."""
        leaders = range(base, base + self.size, self.team)
        edges = []
        if len(leaders) > 1:
            edges += list(zip(leaders, [*leaders[1:], leaders[0]], strict=True))
        for first in leaders:
            for other in range(first + 1, first + self.team):
                edges += [(first, other), (other, first)]
        return edges

    def _group(self, one: int, other: int, backend: str) -> dist.ProcessGroup | None:
        """A new group of two; None if this rank is not in it."""
        timeout = timedelta(seconds=self._timeout)
        group = dist.new_group([one, other], timeout=timeout, backend=backend)
        if not isinstance(group, dist.ProcessGroup):
            return None
        self._groups.append(group)
        return group

    # -- runs -----------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self,
        request: Request,
        model: Model,
        *,
        dtype: torch.dtype = torch.float32,
        buckets: Sequence[int] | None = None,
        also: Sequence[str] = (),
    ) -> Result:
        """Runs a request; every rank makes the same call.

        Args:
            request: With `SRDS`, or no method: then a team samples serially, with its guidance
                branches side by side. Its ``x`` is read on rank 0, and has the same shape on all;
                its noise is the same on all. ``on_step`` is called on the rank of the last block.
            model: As for the engine: ``model(batch)`` returns ``[N, *shape]``.
            dtype: Of the model's inputs and outputs.
            buckets: Sizes of a model call, ascending, as the engine has them; None for any number.
            also: What else must be the same on all ranks, in a few words each, such as the name
                and a digest of what only the model reads. Where it is not, the run fails.

        Returns:
            The result, with the summary of the calls that this rank has made.

        Raises:
            RankError: Something went wrong on a rank, or it is gone; the same on all that remain.
            ValueError: The request cannot be run so.
            TypeError: Nor with this method or model.
        """
        request = self._check(request, dtype, buckets)
        live = Live(request, self.device, SharedSchedule)
        if self.team not in (1, live.branches):
            raise ValueError(
                f"Ranks.run: guidance has {live.branches} branches, expected {self.team}, one for "
                "each rank of a team"
            )
        if buckets is not None and buckets[-1] < (live.branches if self.team == 1 else 1):
            raise ValueError(
                f"Ranks.run: buckets are {list(buckets)}, expected room for the {live.branches} "
                "branches of a row"
            )
        plan, x = request.plan, request.x
        greeting = greeting_of(
            f"{list(x.shape)} latents",
            f"{len(plan)} steps of {plan.name} {plan.digest[:16]}",
            *also,
            f"guidance {live.weights[0]}",
            str(dtype),
            repr(request.method),
        )
        whole = tuple(range(live.branches))
        branches = whole if self.team == 1 else (self.rank % self.team,)
        calls = Calls(live, model, branches, buckets)
        if self._leader is not None:
            help_leader(live, calls, self._leader, self._ring.rank, greeting, dtype)
        else:
            self._lead(live, calls, greeting, dtype)
        return self._result(live)

    def _check(
        self, request: Request, dtype: torch.dtype, buckets: Sequence[int] | None
    ) -> Request:
        """The request with a method that has blocks."""
        check_request(request, tuple(request.x.shape[1:]))
        if dtype not in MODEL_DTYPES:
            raise TypeError(f"Ranks.run: dtype is {dtype}, expected float32, float16 or bfloat16")
        if not len(request.plan):
            raise ValueError(f"Ranks.run: {request.plan.name} has no steps, expected 1 or more")
        if buckets is not None and (
            not buckets or min(buckets) < 1 or list(buckets) != sorted(set(buckets))
        ):
            raise ValueError(f"Ranks.run: buckets are {list(buckets)}, expected ascending sizes")
        if isinstance(request.method, SRDS):
            return request
        if request.method is not None or self._ring.size > 1:
            raise TypeError(
                f"Ranks.run: method is {request.method!r}, expected SRDS settings, or None where "
                "all ranks are one team"
            )
        return replace(request, method=SRDS(blocks=1, exact=True))

    def _lead(self, live: Live, calls: Calls, greeting: str, dtype: torch.dtype) -> None:
        """A run on a rank that has blocks."""
        assert live.parallel is not None
        last = (live.parallel.blocks - 1) % self._ring.size
        team = Team(self._helpers, self._ring.rank, self._timeout)
        traffic = Traffic(self._ring, live.count, last, greeting)
        failure: str | None = f"rank {self._ring.rank} was broken off"
        try:
            team.greet(greeting)
            run = BlockRun(live, self._ring, calls, team, traffic, dtype, self.device)
            self._loop(run, traffic, team)
            failure = None
        except Exception as error:
            failure = sentence_of(error, self._ring.rank)
            if isinstance(error, RankError):
                raise
            raise RankError(failure) from error
        finally:
            if failure is not None:
                traffic.fail(failure)
            traffic.end()
            team.end(live, failure)

    def _loop(self, run: BlockRun, traffic: Traffic, team: Team) -> None:
        """Until all images have their results."""
        run.start()
        while run.left:
            try:
                run.turn()
            except Exception as error:
                traffic.fail(sentence_of(error, self._ring.rank))
                if traffic.failure is not None:
                    raise RankError(traffic.failure) from error
                # all images had their results before: what failed was superfluous
                run.take_in(traffic.rest())
                if run.left:
                    raise

    def _result(self, live: Live) -> Result:
        assert live.result is not None
        result = live.end("done")
        note = result.summary.note
        if self.size > 1:
            note = f"calls of rank {self.rank} of {self.size} only{'; ' if note else ''}{note}"
        return replace(result, id=0, summary=replace(result.summary, note=note))

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets go of the connections; not of the job's process group."""
        while self._groups:
            dist.destroy_process_group(self._groups.pop())

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
