"""``sidestep bench srds --processes P``: the same pictures by P processes together, and by one.

Only what needs several processes is measured: SRDS, SRDS with a single iteration, and on two of
them the guidance branches side by side.  One prompt at a time, for several are quicker with each
process making pictures of its own.  The process that they are compared with has as many threads as
each of them.  Beside it stands what the planner has predicted.

In the entries ``ticks`` are the model calls of the first process, which depend on when the others
are done, and ``nfe`` the evaluations of all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sidestep.adapters.catalogue import make_scheduler
from sidestep.bench.documents import write
from sidestep.bench.srds import Settings, document_of, fitting, methods_of
from sidestep.bench.srds_job import Piece, Task, pieces
from sidestep.bench.srds_results import Entry, GuidanceSplit, enter, key_of, new_entry
from sidestep.errors import UserError
from sidestep.models import load_pipeline
from sidestep.planning import Measured, measure
from sidestep.planning_load import busy
from sidestep.report.progress import progress
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.plan import Plan
from sidestep.runtime.planner import Decision, predict

_PATIENCE = 30  # times the serial sampler's time, for all ways to make one picture
_LEAST = 120.0  # seconds without a word


def run(
    *,
    settings: Settings,
    sets: Sequence[str],
    steps: Sequence[int],
    coarse: Sequence[str],
    spacing: Sequence[str] = (),
    processes: int,
    state: Path,
    fresh: bool,
) -> dict[str, Any]:
    """Measures what the document at ``state`` does not have yet of so many processes.

    Args:
        settings: As for `sidestep.bench.srds.run`, and so are the others; its batch is not used.
        sets: Prompt sets.
        steps: Numbers of steps.
        coarse: Coarse solvers of SRDS.
        spacing: Of its blocks.
        processes: P, 2 or more.
        state: The JSON document, kept up to date after every prompt.
        fresh: Measure what is chosen again.

    Returns:
        The document.

    Raises:
        UserError: There are more processes than blocks, or the job has failed; and as for the
            other one.
    """
    bench = ProcessBench(settings, document_of(settings, state), state, processes)
    for n in steps:
        bench.check(n, methods_of(settings, coarse, spacing))
    for n in steps:
        for name in sets:
            bench.measure(name, n, methods_of(settings, coarse, spacing), fresh)
    return bench.document


def threads_of(processes: int) -> int:
    """Of each process, so that all of them share the cores that this one may use."""
    share = getattr(os, "sched_getaffinity", None)
    cores = len(share(0)) if share is not None else os.cpu_count() or 1
    return max(1, cores // processes)


class ProcessBench:
    """The pipeline, and the document that grows."""

    def __init__(
        self, settings: Settings, document: dict[str, Any], state: Path, processes: int
    ) -> None:
        self.settings = settings
        self.document = document
        self.state = state
        self.processes = processes
        self.threads = threads_of(processes)
        self.pipe = load_pipeline(settings.model)
        self.pipe.scheduler = make_scheduler(settings.scheduler, None, self.pipe.scheduler)

    def check(self, steps: int, methods: Sequence[SRDS]) -> None:
        """Refuses, before any work is done, what cannot be shared out.

        Raises:
            UserError: Some processes would have no block, or SRDS cannot run the sampler.
        """
        plan = Plan.from_scheduler(self.pipe.scheduler, steps)
        for method in methods:
            blocks = len(fitting(method, plan).bounds(plan)) - 1
            if blocks < self.processes:
                raise UserError(
                    f"--processes: got {self.processes}, expected at most {blocks}, the blocks "
                    f"that SRDS has at {steps} steps"
                )

    def measure(self, name: str, steps: int, methods: Sequence[SRDS], fresh: bool) -> None:
        """All ways on one set of prompts; prompts that are there are kept."""
        ways: list[SRDS | GuidanceSplit] = [
            each for method in methods for each in (method, replace(method, max_iterations=1))
        ]
        if self.processes == 2 and self.settings.guidance > 1:
            ways.append(GuidanceSplit())
        entries = {way: self._entry(name, steps, way, fresh) for way in ways}
        todo = [
            (index, text, missing)
            for index, text in enumerate(self.settings.texts(name))
            if (missing := [w for w in ways if index not in entries[w]["images"]["index"]])
        ]
        if not todo:
            return
        planned = self._planned(steps)
        plan = Plan.from_scheduler(self.pipe.scheduler, steps)
        for way, entry in entries.items():
            entry["planner"] = forecast(planned, way, plan, self.processes)
        assert planned.alone is not None
        serial = steps * float(planned.alone(1))
        task = Task(
            model=self.settings.model, scheduler=self.settings.scheduler, steps=steps,
            guidance=self.settings.guidance, seed=self.settings.seed, threads=self.threads,
            timeout=_LEAST + _PATIENCE * serial, prompts=todo,
        )  # fmt: skip
        label = f"{name}, {steps} steps, {self.processes} processes"
        with progress(len(todo), label) as advance, closing(pieces(task, self.processes)) as made:
            for (_, text, missing), piece in zip(todo, made, strict=True):
                self._keep([entries[way] for way in missing], piece, text)
                advance()

    def _keep(self, entries: Sequence[Entry], piece: Piece, text: str) -> None:
        """One prompt's pictures enter the document."""
        for entry, made in zip(entries, piece.made, strict=True):
            enter(entry, made, piece.serial, piece.index)
            entry["texts"].append(text)
            if entry not in self.document["results"]:
                self.document["results"].append(entry)
        write(self.document, self.state)

    def _planned(self, steps: int) -> Measured:
        """What the planner measures here with the threads of one process, alone and beside others.

        They share the machine, on which a call takes longer then.
        """
        own, guidance = torch.get_num_threads(), self.settings.guidance
        torch.set_num_threads(self.threads)
        try:
            alone = measure(self.pipe, steps, 1, guidance_scale=guidance)
            with busy(self.settings.model, self.processes - 1, self.threads):
                together = measure(self.pipe, steps, 1, guidance_scale=guidance)
            return replace(together, alone=alone.latency)
        except ValueError as error:
            raise UserError(str(error)) from error
        finally:
            torch.set_num_threads(own)

    def _entry(self, name: str, steps: int, way: SRDS | GuidanceSplit, fresh: bool) -> Entry:
        """The entry to continue, or a new one, which enters the document with its first prompt."""
        new = new_entry(
            name, steps, way, solver=self.settings.solver, batch=1, processes=self.processes
        )
        new |= {"threads": self.threads, "texts": []}
        mine = [r for r in self.document["results"] if key_of(r) == key_of(new)]
        same = ("settings", "threads")
        if mine and not fresh and all(mine[0][each] == new[each] for each in same):
            found: Entry = mine[0]
            return found
        self.document["results"] = [r for r in self.document["results"] if r not in mine]
        return new


def forecast(
    measured: Measured, way: SRDS | GuidanceSplit, plan: Plan, processes: int
) -> dict[str, Any]:
    """What the planner says of so many processes, and of one way to use them.

    Returns:
        ``choice``, its kind, and ``speedup``, that of the choice; ``reason``; ``srds`` and
        ``guidance``, the best of these kinds (None where there is none); ``predicted``, of the way
        itself, with as many iterations as SRDS is expected to need with its number of blocks, or
        is allowed (None where the planner does not know that number).
    """
    decision = measured.plan(len(plan), ranks=processes)
    best = {kind: _speedup(decision, kind) for kind in ("srds", "guidance")}
    if isinstance(way, GuidanceSplit):
        predicted = best["guidance"]
    elif way.max_iterations is None:
        predicted = _speedup(decision, "srds", len(way.bounds(plan)) - 1)
    else:
        most = way.max_iterations
        cost = predict(
            measured.latency, way.bounds(plan), [most], ranks=processes, width=way.width,
            overhead=measured.overhead, most=most,
        )  # fmt: skip
        predicted = len(plan) * float((measured.alone or measured.latency)(1)) / cost.seconds
    return {
        "choice": decision.choice.kind, "speedup": decision.choice.speedup,
        "reason": decision.reason, **best, "predicted": predicted,
    }  # fmt: skip


def _speedup(decision: Decision, kind: str, blocks: int | None = None) -> float | None:
    """The best candidate's of a kind, with that number of blocks if one is given."""
    for one in decision.candidates:
        if one.kind == kind and blocks in (None, one.blocks):
            return one.speedup
    return None
