"""``sidestep bench exits``: early exit beside everything else that makes a transformer cheaper.

For every number of steps and batch size the pipeline makes the pictures in full. Then every policy
makes them from the same noise, pipeline and all, and is judged by the distance of its pictures to
those, against the blocks it ran and the seconds it took. What is compared is in `exits_grid`.

The largest batch makes all pictures; smaller ones, which give the same ones but slower, the first
of them. The JSON document is written after every policy, and a run that finds one continues it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sidestep.adapters.catalogue import make_scheduler
from sidestep.bench import exits_peers as peers
from sidestep.bench.documents import open_document, write
from sidestep.bench.exits_grid import FAMILIES, OVERHEAD, Planned, Policy, fewer_steps, policies
from sidestep.bench.exits_oracle import Seen, gate, look, oracle, static, verdict
from sidestep.bench.frechet import FEATURES, Features, frechet_distance
from sidestep.errors import UserError
from sidestep.metrics import mean_psnr, percentile, psnr, ssim
from sidestep.models import load_pipeline
from sidestep.report.progress import progress
from sidestep.runtime.calibration import recorded
from sidestep.runtime.exits.file import Exits, load_exits
from sidestep.runtime.exits.layouts import layout_of
from sidestep.sampling import Job, Run, run_jobs

FULL = Policy(family="full", label="all blocks")


WARM_UP = 2
"""Steps of a run before the first that counts: a process's first calls are slower."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all results of one document have in common.

    Attributes:
        model: Folder of the transformer's pipeline.
        exits: Its exits file.
        faithful: Folder of AdaDiff's pipeline, None without.
        faithful_exits: Its exits file.
        prompts: Of the pictures.
        solver: Scheduler; None for the pipeline's own.
        subset: Pictures of batch sizes other than the largest, at least one batch.
        thresholds: Budgets of `EarlyExit`.
    """

    model: str
    exits: Path
    faithful: str | None
    faithful_exits: Path | None
    prompts: Sequence[str]
    solver: str | None
    guidance: float
    seed: int
    subset: int
    thresholds: Sequence[float]

    def common(self) -> dict[str, Any]:
        """As the document has it."""
        return {
            "command": "bench exits", "model": self.model, "exits": recorded(self.exits),
            "faithful": self.faithful, "faithful_exits": recorded(self.faithful_exits),
            "prompts": list(self.prompts), "solver": self.solver, "guidance": self.guidance,
            "seed": self.seed, "subset": self.subset, "thresholds": list(self.thresholds),
            "fd_small": FEATURES,
        }  # fmt: skip


@dataclass
class Setting:
    """One number of steps and batch size, with its full run."""

    steps: int
    batch: int
    plain: Run


def run(
    *,
    settings: Settings,
    steps: Sequence[int],
    batches: Sequence[int],
    chosen: Sequence[str],
    with_gate: bool,
    state: Path,
    fresh: bool,
) -> dict[str, Any]:
    """Measures what the document at ``state`` does not have yet.

    Args:
        settings: Model, exits, prompts, noise.
        steps: Numbers of steps.
        batches: Batch sizes.
        chosen: Families; all but `OVERHEAD` if empty.
        with_gate: Whether to ask what exits by sample could save at all, before the rest.
        state: The JSON document, kept up to date.
        fresh: Measure what is chosen again.

    Returns:
        The document: ``results``, one entry per steps, batch, method and setting; ``gate``.

    Raises:
        UserError: A family is unknown, ``state`` was made with other settings, or the exits are of
            another model.
    """
    known = (*FAMILIES, OVERHEAD)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UserError(
            f"--methods: {unknown[0]!r} is unknown, expected some of {', '.join(known)}"
        )
    names = [name for name in known if name in (chosen or FAMILIES)]
    bench = Bench(settings, state, fresh)
    for n in steps:
        if with_gate:
            bench.gate(n, max(batches))
        for batch in sorted(batches, reverse=True):
            bench.measure(n, batch, names, whole=batch == max(batches))
    return bench.document


def load_checked(model: str, exits: Path, kind: str) -> tuple[Any, Exits]:
    """A pipeline and its exits.

    Raises:
        UserError: They are not of each other, or the exits are of another kind.
    """
    try:
        found = load_exits(exits)
        pipe = load_pipeline(model)
        if getattr(pipe, "transformer", None) is None:
            raise UserError(f"--model: {type(pipe).__name__} has no transformer to leave early")
        found.check_model(pipe.transformer)
        layout_of(pipe.transformer)
    except ValueError as error:
        raise UserError(str(error)) from error
    if found.kind != kind:
        raise UserError(
            f"bench exits: {exits} was trained with --mode {found.kind}, expected --mode {kind}"
        )
    return pipe, found


class Bench:
    """The pipelines, and the document that grows."""

    def __init__(self, settings: Settings, state: Path, fresh: bool) -> None:
        """Loads what is compared, and the document to continue."""
        self.settings, self.state, self.fresh = settings, state, fresh
        self.pipe, self.exits = load_checked(settings.model, settings.exits, "excess")
        self.faithful: Any = None
        if settings.faithful is not None and settings.faithful_exits is not None:
            self.faithful, _ = load_checked(settings.faithful, settings.faithful_exits, "faithful")
        self.document = open_document(settings.common(), state)
        self.document.setdefault("gate", [])
        self.document["first_block_cache"] = peers.reason(self.pipe.transformer)
        self.features = Features()
        self._seen: dict[int, Seen] = {}  # by steps

    def gate(self, steps: int, batch: int) -> None:
        """Writes the gate of a number of steps, if it is not there."""
        known = self.document["gate"]
        if not self.fresh and any(entry["steps"] == steps for entry in known):
            return
        entries = gate(self._look(steps, batch), self.settings.thresholds)
        others = [entry for entry in known if entry["steps"] != steps]
        self.document["gate"] = [*others, *({"steps": steps, **entry} for entry in entries)]
        self.document["gate_default"] = verdict(self.document["gate"])
        write(self.document, self.state)

    def measure(self, steps: int, batch: int, names: Sequence[str], whole: bool) -> None:
        """All policies of the chosen families; what is there is kept."""
        s = self.settings
        texts = list(s.prompts) if whole else list(s.prompts)[: max(batch, s.subset)]
        known = [policy for name in names for policy in self._policies(name, steps)]
        wanted = self._missing(steps, batch, known)
        late = [name for name in ("fewer-steps", "oracle") if name in names]
        if not wanted and not any(self._due(name, steps, batch) for name in late):
            return
        self._jobs(self.pipe, [FULL], WARM_UP, batch, texts[:batch])
        # These take turns with the full run, so that their times compare well.
        together = [p for p in wanted if p.family in ("static", OVERHEAD)]
        full, *made = self._jobs(self.pipe, [FULL, *together], steps, batch, texts)
        setting = Setting(steps, batch, full)
        if self._missing(steps, batch, [FULL]):
            more = {"fd_small_other_seeds": self._chance(setting)} if whole else {}
            self._enter(setting, FULL, full, more)
        for policy, run in zip(together, made, strict=True):
            equal = {"bit_equal": torch.equal(run.images, full.images)}
            self._enter(setting, policy, run, equal if policy.family == OVERHEAD else {})
        others = [p for p in wanted if p not in together]
        with progress(len(others), f"{steps} steps, batch {batch}") as advance:
            for policy in others:
                self._measure(setting, policy, texts)
                advance(f"{policy.family} {policy.label}")
        for name in late:
            for policy in self._due(name, steps, batch):
                if name == "oracle":
                    policy = self._planned(policy, setting, len(texts))
                self._measure(setting, policy, texts[:batch] if name == "oracle" else texts)

    def _missing(self, steps: int, batch: int, wanted: Sequence[Policy]) -> list[Policy]:
        """Those that are to be measured."""
        known = {(r["method"], r["setting"]) for r in self._results(steps, batch)}
        return [p for p in wanted if self.fresh or (p.family, p.label) not in known]

    def _policies(self, family: str, steps: int) -> list[Policy]:
        s = self.settings
        if family in ("fewer-steps", "oracle"):
            return []
        if family == "first-block-cache" and self.document["first_block_cache"]:
            return []
        return policies(family, steps, s.exits, s.thresholds, s.faithful_exits)

    def _measure(self, setting: Setting, policy: Policy, texts: list[str]) -> None:
        steps, batch = setting.steps, setting.batch
        if policy.family == "adadiff":
            own, made = self._jobs(self.faithful, [FULL, policy], steps, batch, texts)
            more = {"psnr_own_full_to_full": mean_psnr(psnr(own.images, setting.plain.images))}
            self._enter(setting, policy, made, more, own)
            return
        cache: AbstractContextManager[peers.Blocks | None] = nullcontext()
        if policy.family == "first-block-cache":
            assert policy.threshold is not None
            cache = peers.first_block_cache(self.pipe.transformer, policy.threshold)
        with cache as counted:
            [made] = self._jobs(self.pipe, [policy], steps, batch, texts)
        if counted is not None:
            made.layers = [counted.depth] * len(made.images)
        self._enter(setting, policy, made)

    def _due(self, family: str, steps: int, batch: int) -> list[Policy]:
        """What is known only once static plans, or errors, were measured, and is missing."""
        if family == "oracle":
            budgets = self.settings.thresholds
            found = [Policy(family=family, label=f"{t:g}", threshold=t) for t in budgets]
        else:
            plans = [r for r in self._results(steps, batch) if r["method"] == "static"]
            found = fewer_steps([r["share"] for r in plans], steps)
        return self._missing(steps, batch, found)

    def _planned(self, policy: Policy, setting: Setting, pictures: int) -> Policy:
        """The oracle's own exits for the first batch of pictures."""
        assert policy.threshold is not None
        rows = min(setting.batch, pictures)
        seen = self._look(setting.steps, setting.batch).first(rows)
        first = static(seen.damages, seen.depths, policy.threshold)[0]
        plan = oracle(seen.damages, seen.depths, first, policy.threshold)
        table = tuple(tuple(row) for row in plan.tolist())
        return replace(policy, method=Planned(exits=self.settings.exits, plan=table))

    def _look(self, steps: int, batch: int) -> Seen:
        """All pictures' errors at every exit."""
        if steps not in self._seen:
            s = self.settings
            own = self.pipe.scheduler
            batches = -(-len(s.prompts) // batch)
            with progress(batches, f"{steps} steps: errors of all exits") as advance:
                try:
                    self.pipe.scheduler = make_scheduler(s.solver, None, own)
                    self._seen[steps] = look(
                        self.pipe, self.exits, s.prompts, steps=steps, guidance=s.guidance,
                        seed=s.seed, batch=batch, on_batch=advance,
                    )  # fmt: skip
                finally:
                    self.pipe.scheduler = own
        return self._seen[steps]

    def _chance(self, setting: Setting) -> float:
        """FD-small between full runs from different seeds: what chance alone makes of it."""
        texts = list(self.settings.prompts)
        shift = len(texts)
        [other] = self._jobs(self.pipe, [FULL], setting.steps, setting.batch, texts, shift)
        return self._distance(other.images, setting.plain.images)

    def _distance(self, images: torch.Tensor, reference: torch.Tensor) -> float:
        return frechet_distance(self.features(images), self.features(reference))

    def _jobs(
        self, pipe: Any, chosen: Sequence[Policy], steps: int, batch: int, texts: list[str],
        shift: int = 0,
    ) -> list[Run]:  # fmt: skip
        s = self.settings
        jobs = [
            Job(
                label=f"{p.family} {p.label}", method=p.method, solver=s.solver,
                steps=p.steps or steps,
            )
            for p in chosen
        ]  # fmt: skip
        return run_jobs(pipe, jobs, texts, guidance=s.guidance, seed=s.seed + shift, batch=batch)

    def _results(self, steps: int, batch: int) -> list[dict[str, Any]]:
        return [r for r in self.document["results"] if (r["steps"], r["batch"]) == (steps, batch)]

    def _enter(
        self,
        setting: Setting,
        policy: Policy,
        made: Run,
        more: dict[str, Any] | None = None,
        plain: Run | None = None,
    ) -> None:
        """Writes one result into the document, in the place of an older one."""
        entry = result(setting, policy, made, plain or setting.plain, self.exits.blocks)
        count, reference = len(made.images), setting.plain.images
        entry |= more or {}
        all_of_them = count == len(self.settings.prompts) and count > 1
        entry["fd_small"] = self._distance(made.images, reference[:count]) if all_of_them else None
        mine = ("steps", "batch", "method", "setting")
        others = [r for r in self.document["results"] if any(r[key] != entry[key] for key in mine)]
        self.document["results"] = [*others, entry]
        write(self.document, self.state)


def result(setting: Setting, policy: Policy, made: Run, plain: Run, blocks: int) -> dict[str, Any]:
    """One entry of the document.

    Args:
        setting: Steps and batch.
        policy: What was run.
        made: What it gave.
        plain: The full run that its pictures and its seconds are compared with.
        blocks: Of the model.
    """
    reference = plain.images[: len(made.images)]
    decibels = psnr(made.images, reference)
    calls = sum(made.nfe) / len(made.nfe)
    layers = sum(made.layers) / len(made.layers) if made.layers else None
    share = calls / setting.steps if layers is None else layers / blocks
    timed = max(made.sizes) == max(plain.sizes)
    return {
        "method": policy.family,
        "setting": policy.label,
        "threshold": policy.threshold,
        "solver": made.solver,
        "steps": setting.steps,
        "batch": setting.batch,
        "pictures": len(made.images),
        "nfe": calls,
        "ticks": sum(made.ticks) / len(made.ticks),
        "layers": share * blocks,
        "share": share,
        "seconds": made.median_seconds,
        "speedup": plain.median_seconds / made.median_seconds if timed else None,
        "psnr": mean_psnr(decibels),
        "psnr_p10": min(percentile(decibels, 0.1), 100.0),
        "ssim": sum(values := ssim(made.images, reference)) / len(values),
        "images": {"psnr": [round(min(value, 100.0), 3) for value in decibels]},
    }
