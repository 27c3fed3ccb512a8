"""``sidestep bench srds``: the serial sampler, SRDS and ParaDiGMS from the same noise.

For every number of steps and set of prompts the pipeline makes the pictures one step after the
other, and with SRDS, where every picture stops by itself.  ParaDiGMS (`srds_picard`) runs on the
same latents in plain torch.  All are judged by their distance to the serial result, against the
model calls that follow one another: ticks, of each picture by itself.

The JSON document is written after every batch of prompts, and a run that finds one continues it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sidestep.adapters.catalogue import make_scheduler
from sidestep.adapters.denoiser import decode, first_noise
from sidestep.bench.adaptive import CLASSES
from sidestep.bench.documents import open_document, write
from sidestep.bench.srds_picard import (
    PUBLISHED,
    STRICT,
    Denoiser,
    ParaDiGMS,
    check_plan,
    picard,
)
from sidestep.bench.srds_results import Entry, Made, enter, key_of, label_of, new_entry
from sidestep.errors import UserError
from sidestep.models import load_pipeline, load_prompts, spaced
from sidestep.report.progress import progress
from sidestep.runtime.methods.coarse import COARSE
from sidestep.runtime.methods.srds import SPACINGS, SRDS
from sidestep.runtime.plan import Plan
from sidestep.sampling import Job, run_jobs

SETS = ("novel", "trained")
STEPS = (25, 50, 100, 196, 961)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all results of one document have in common.

    Attributes:
        srds: Settings of SRDS, but for the coarse solver and the spacing of the blocks.
        peers: Prompts of each set that ParaDiGMS runs on, in whole batches, evenly spaced.
        tolerances: Of ParaDiGMS, to compare.
    """

    model: str
    solver: str
    prompts: int
    guidance: float
    seed: int
    batch: int
    srds: SRDS
    peers: int
    tolerances: tuple[float, ...] = (PUBLISHED, STRICT)

    def texts(self, name: str) -> list[str]:
        """The prompts of a set, evenly spaced."""
        return spaced(load_prompts(name), self.prompts)

    @property
    def scheduler(self) -> str:
        """The scheduler's class."""
        return CLASSES.get(self.solver, self.solver)

    @property
    def every(self) -> int:
        """ParaDiGMS runs on one batch in so many."""
        return max(1, round(self.prompts / max(self.peers, 1)))


def srds_settings(
    blocks: int | None,
    tolerance: float | None,
    coarse: Sequence[str],
    steps: Sequence[int],
    spacing: Sequence[str] = (),
) -> SRDS:
    """The settings of SRDS, of which ``blocks`` and ``tolerance`` may be left to it.

    Raises:
        UserError: One is out of range, or a coarse solver or spacing unknown.
    """
    try:
        settings = SRDS(blocks=blocks)
        for name in coarse:
            replace(settings, coarse=name)
        for name in spacing:
            replace(settings, spacing=name)
        for n in steps:
            settings.bounds(n)
        return settings if tolerance is None else replace(settings, tolerance=tolerance)
    except ValueError as error:
        raise UserError(str(error)) from error


def run(
    *,
    settings: Settings,
    sets: Sequence[str],
    steps: Sequence[int],
    coarse: Sequence[str],
    spacing: Sequence[str] = (),
    state: Path,
    fresh: bool,
) -> dict[str, Any]:
    """Measures what the document at ``state`` does not have yet.

    Args:
        settings: Model, prompts, noise.
        sets: Prompt sets, of `SETS`.
        steps: Numbers of steps.
        coarse: Coarse solvers of SRDS that are compared; the default one if empty.
        spacing: In what its blocks are of equal length, each with every coarse solver; the default
            if empty.
        state: The JSON document, kept up to date.
        fresh: Measure what is chosen again.

    Returns:
        The document: ``results``, one entry per set, steps and method.

    Raises:
        UserError: ``state`` was made with other settings, or SRDS cannot run the sampler so.
    """
    document = document_of(settings, state)
    bench = Bench(settings, document, state)
    methods = methods_of(settings, coarse, spacing)
    for n in steps:
        for name in sets:
            bench.measure(name, n, methods, fresh)
    return document


def methods_of(settings: Settings, coarse: Sequence[str], spacing: Sequence[str]) -> list[SRDS]:
    """SRDS with every coarse solver and spacing; the defaults where none is named."""
    return [
        replace(settings.srds, coarse=each, spacing=length)
        for length in spacing or SPACINGS[:1]
        for each in coarse or [next(iter(COARSE))]
    ]


def document_of(settings: Settings, state: Path) -> dict[str, Any]:
    """The document to continue, or a new one."""
    common = {
        "command": "bench srds", "model": settings.model, "solver": settings.solver,
        "prompts": {name: settings.texts(name) for name in SETS}, "guidance": settings.guidance,
        "seed": settings.seed, "batch": settings.batch, "blocks": settings.srds.blocks,
        "tolerance": settings.srds.tolerance,
    }  # fmt: skip
    return open_document(common, state)


def fitting(method: SRDS, plan: Plan) -> SRDS:
    """The same method.

    Raises:
        UserError: It cannot run the plan.
    """
    try:
        method.check(plan)
        COARSE[method.coarse](plan, method.bounds(plan), torch.device("cpu"))
    except ValueError as error:
        raise UserError(str(error)) from error
    return method


class Bench:
    """The pipeline, and the document that grows."""

    def __init__(self, settings: Settings, document: dict[str, Any], state: Path) -> None:
        self.settings = settings
        self.document = document
        self.state = state
        self.pipe = load_pipeline(settings.model)

    def measure(self, name: str, steps: int, own: Sequence[SRDS], fresh: bool) -> None:
        """All methods on one set of prompts; batches that are there are kept."""
        settings, texts = self.settings, self.settings.texts(name)
        scheduler = make_scheduler(settings.scheduler, None, self.pipe.scheduler)
        plan = Plan.from_scheduler(scheduler, steps)
        methods: list[SRDS | ParaDiGMS] = [fitting(method, plan) for method in own]
        peers = self._peers(plan) if settings.peers else []
        entries = [self._entry(name, steps, method, fresh) for method in [*methods, *peers]]
        pieces = []
        for number, first in enumerate(range(0, len(texts), settings.batch)):
            chosen = [*methods, *(peers if number % settings.every == 0 else [])]
            missing = [
                (entry, method)
                for entry, method in zip(entries, [*methods, *peers], strict=True)
                if method in chosen and first not in entry["batches"]["first"]
            ]
            if missing:
                pieces.append((number, first, missing))
        total = steps * sum(1 + len(missing) for *_, missing in pieces)
        with progress(total, f"{name}, {steps} steps") as advance:
            for number, first, missing in pieces:
                chunk = texts[first : first + settings.batch]
                self._piece(steps, number, first, chunk, missing, advance)

    def _peers(self, plan: Plan) -> list[ParaDiGMS]:
        """ParaDiGMS as wide as SRDS is, at every tolerance."""
        try:
            check_plan(plan)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            return []
        width = len(self.settings.srds.bounds(len(plan))) - 1
        return [ParaDiGMS(window=width, tolerance=each) for each in self.settings.tolerances]

    def _piece(
        self,
        steps: int,
        number: int,
        first: int,
        texts: list[str],
        missing: Sequence[tuple[Entry, SRDS | ParaDiGMS]],
        advance: Callable[[str], None],
    ) -> None:
        """One batch of prompts by the serial sampler and by what it is missing from."""
        settings = self.settings
        parallel = [method for _, method in missing if isinstance(method, SRDS)]
        jobs = [
            Job(label=label_of(method), method=method, solver=settings.scheduler, steps=steps)
            for method in [None, *parallel]
        ]
        # They take turns at being first, so that a disturbance of the machine meets all of them.
        turned = jobs[::-1] if number % 2 else jobs
        runs = run_jobs(
            self.pipe, turned, texts, guidance=settings.guidance, seed=settings.seed + first,
            batch=settings.batch, on_step=advance,
        )  # fmt: skip
        serial, *found = runs[::-1] if number % 2 else runs
        made = {method: Made.of(run) for method, run in zip(parallel, found, strict=True)}
        for entry, method in missing:
            if isinstance(method, ParaDiGMS):
                outcome = self._picard(method, steps, first, texts, advance)
            else:
                outcome = made[method]
            enter(entry, outcome, serial, first)
            if entry not in self.document["results"]:
                self.document["results"].append(entry)
        write(self.document, self.state)

    @torch.no_grad()
    def _picard(
        self,
        method: ParaDiGMS,
        steps: int,
        first: int,
        texts: list[str],
        advance: Callable[[str], None],
    ) -> Made:
        settings, pipe = self.settings, self.pipe
        plan = Plan.from_scheduler(make_scheduler(settings.scheduler, None, pipe.scheduler), steps)
        noise = first_noise(pipe, settings.seed + first, len(texts))
        start = time.perf_counter()
        found = picard(
            method, plan, Denoiser(pipe, texts, settings.guidance), noise * plan.initial_scale,
            lambda: advance(label_of(method)),
        )  # fmt: skip
        images = decode(pipe, found.x)
        return Made(
            images=images, latents=found.x, iterations=found.ticks, ticks=found.ticks,
            nfe=[float(n) for n in found.nfe], estimates=None,
            seconds=time.perf_counter() - start,
        )  # fmt: skip

    def _entry(self, name: str, steps: int, method: SRDS | ParaDiGMS, fresh: bool) -> Entry:
        """The entry to continue, or a new one, which enters the document with its first batch."""
        new = new_entry(name, steps, method, solver=self.settings.solver, batch=self.settings.batch)
        mine = [r for r in self.document["results"] if key_of(r) == key_of(new)]
        if mine and mine[0]["settings"] == new["settings"] and not fresh:
            return mine[0]
        self.document["results"] = [r for r in self.document["results"] if r not in mine]
        return new
