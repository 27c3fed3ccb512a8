"""``sidestep bench adaptive``: every policy of reuse beside the plain run, at all its settings.

For every scheduler and number of steps the pipeline makes the pictures once in full. Then every
policy makes them from the same noise, pipeline and all, and is judged by its picture's distance
to that full run, against the model calls it made. What is compared is in `adaptive_grid`.

The JSON document is written after every policy, and a run that finds one continues it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.adapters.catalogue import make_scheduler
from sidestep.adapters.denoiser import first_noise
from sidestep.bench import adaptive_peers as peers
from sidestep.bench.adaptive_grid import Policy, families, on_subset, policies
from sidestep.bench.adaptive_oracle import TOGETHER, Simulator, search
from sidestep.bench.adaptive_policies import Schedules
from sidestep.bench.documents import open_document, write
from sidestep.errors import UserError
from sidestep.metrics import mean_psnr, percentile, psnr, ssim
from sidestep.models import load_pipeline, load_prompts, spaced
from sidestep.report.progress import progress
from sidestep.runtime.plan import Plan
from sidestep.sampling import Job, Run, run_jobs

CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}
SOLVERS = tuple(CLASSES)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all results of one document have in common.

    Attributes:
        subset: First prompts, for the families that are measured on fewer (`on_subset`).
    """

    model: str
    prompts: int
    guidance: float
    seed: int
    batch: int
    subset: int

    def texts(self) -> list[str]:
        """The prompts, evenly spaced among the novel ones."""
        return spaced(load_prompts("novel"), self.prompts)


@dataclass
class Setting:
    """One scheduler and number of steps, with its full run."""

    solver: str
    steps: int
    plain: Run


def run(
    *,
    settings: Settings,
    solvers: Sequence[str],
    steps: Sequence[int],
    chosen: Sequence[str],
    oracle_trials: int,
    state: Path,
    fresh: bool,
) -> dict[str, Any]:
    """Measures what the document at ``state`` does not have yet.

    Args:
        settings: Model, prompts, noise.
        solvers: Schedulers, names of `SOLVERS` or diffusers classes.
        steps: Numbers of steps.
        chosen: Families of `families`; all if empty.
        oracle_trials: True runs of the oracle's local search, for each prompt and number of calls.
        state: The JSON document, kept up to date.
        fresh: Measure what is chosen again.

    Returns:
        The document: ``results``, one entry per scheduler, steps and policy.

    Raises:
        UserError: A family is unknown, or ``state`` was made with other settings.
    """
    names = _check_families(chosen)
    document = _document(settings, state)
    bench = Bench(settings, document, state, oracle_trials)
    for n in steps:
        for solver in solvers:
            bench.measure(solver, n, names, fresh)
    return document


def _check_families(chosen: Sequence[str]) -> list[str]:
    unknown = [name for name in chosen if name not in families()]
    if unknown:
        raise UserError(
            f"--policies: {unknown[0]!r} is unknown, expected some of {', '.join(families())}"
        )
    return [name for name in families() if not chosen or name in chosen]


def _document(settings: Settings, state: Path) -> dict[str, Any]:
    """The document to continue, or a new one."""
    common = {
        "command": "bench adaptive", "model": settings.model, "prompts": settings.texts(),
        "guidance": settings.guidance, "seed": settings.seed, "batch": settings.batch,
        "subset": settings.subset,
    }  # fmt: skip
    return open_document(common, state)


class Bench:
    """The pipeline, and the document that grows."""

    def __init__(
        self,
        settings: Settings,
        document: dict[str, Any],
        state: Path,
        oracle_trials: int,
    ) -> None:
        self.settings = settings
        self.document = document
        self.state = state
        self.pipe = load_pipeline(settings.model)
        self.texts = settings.texts()
        self.subset = self.texts[: min(settings.subset, settings.batch)]
        self.oracle_trials = oracle_trials

    def measure(self, solver: str, steps: int, names: Sequence[str], fresh: bool) -> None:
        """All policies of the chosen families under one scheduler; what is there is kept."""
        scheduler: Any = make_scheduler(CLASSES.get(solver, solver), None, self.pipe.scheduler)
        scheduler.set_timesteps(steps)
        exploding = float(scheduler.init_noise_sigma) != 1
        wanted = [p for name in names for p in policies(name, steps, exploding)]
        self._forget_others(solver, steps, names, wanted)
        if not peers.available() and any(p.interval for p in wanted):
            print(peers.MISSING, file=sys.stderr)
            wanted = [p for p in wanted if not p.interval]
        if not fresh:
            wanted = [p for p in wanted if not self._has(solver, steps, p)]
        if not wanted:
            return
        full = Policy(family="plain", label="full")
        runs = [full, *(p for p in wanted if p.calls is None)]
        batches = sum(
            (p.steps or steps) * -(-len(self._prompts(p)) // self.settings.batch) for p in runs
        )
        with progress(batches, f"{solver} {steps}") as advance:
            # The default mode takes turns with the plain run, so that their times compare well.
            together = [p for p in runs if p.family in ("plain", "default")]
            jobs = [self._job(solver, steps, p) for p in together]
            plain, *made = self._jobs(jobs, self.texts, advance)
            setting = Setting(solver, steps, plain)
            for policy, run in zip(together[1:], made, strict=True):
                self._enter(setting, policy, run)
            others = [p for p in runs if p not in together]
            self._estimate(setting, others)
            for policy in others:
                self._enter(setting, policy, self._run(solver, steps, policy, advance))
        self._oracle(setting, [p for p in wanted if p.calls is not None])

    def _forget_others(
        self, solver: str, steps: int, names: Sequence[str], wanted: Sequence[Policy]
    ) -> None:
        """Drops results whose setting is no longer compared, such as an old default's."""
        current = {_id(solver, steps, p) for p in wanted}
        self.document["results"] = [
            r
            for r in self.document["results"]
            if r["policy"] in families()
            and (
                (r["solver"], r["steps"]) != (solver, steps)
                or r["policy"] not in names
                or _key(r) in current
            )
        ]

    def _estimate(self, setting: Setting, runs: Sequence[Policy]) -> None:
        """Says how long it will take if a policy calls the model at 45 steps of 100."""
        plain = setting.plain
        each = sum(plain.seconds) / (len(plain.images) * setting.steps)
        work = sum((p.steps or 0.45 * setting.steps) * len(self._prompts(p)) for p in runs)
        print(
            f"{setting.solver}, {setting.steps} steps: {len(runs)} more settings, "
            f"about {each * work / 60:.0f} minutes",
            file=sys.stderr,
        )

    def _prompts(self, policy: Policy) -> list[str]:
        return self.subset if on_subset(policy.family) else self.texts

    def _has(self, solver: str, steps: int, policy: Policy) -> bool:
        mine = _id(solver, steps, policy)
        return any(_key(r) == mine for r in self.document["results"])

    def _job(self, solver: str, steps: int, policy: Policy) -> Job:
        return Job(
            label=f"{solver} {steps}: {policy.family} {policy.label}",
            method=policy.method,
            solver=CLASSES.get(solver, solver),
            steps=policy.steps or steps,
        )

    def _run(self, solver: str, steps: int, policy: Policy, advance: Callable[[str], None]) -> Run:
        """One policy on its prompts."""
        job = self._job(solver, steps, policy)
        peer = peers.deepcache(self.pipe, policy.interval) if policy.interval else nullcontext()
        with peer:
            [run] = self._jobs([job], self._prompts(policy), advance)
        if policy.interval:
            run.nfe = [peers.deepcache_calls(self.pipe, steps, policy.interval)] * len(self.texts)
        return run

    def _jobs(
        self, jobs: list[Job], texts: list[str], advance: Callable[[str], None] | None = None
    ) -> list[Run]:
        s = self.settings
        return run_jobs(
            self.pipe, jobs, texts, guidance=s.guidance, seed=s.seed, batch=s.batch, on_step=advance
        )

    def _oracle(self, setting: Setting, wanted: list[Policy]) -> None:
        """Searches the schedules of the first prompts, and runs them in the pipeline."""
        if not wanted:
            return
        texts = self.subset
        calls = [p.calls for p in wanted if p.calls is not None]
        solver = CLASSES.get(setting.solver, setting.solver)
        plan = Plan.from_scheduler(make_scheduler(solver, None, self.pipe.scheduler), setting.steps)
        rounds = len(texts) + len(calls) * -(-self.oracle_trials // TOGETHER)
        with progress(rounds, f"{setting.solver} {setting.steps}: oracle") as advance:
            noise = first_noise(self.pipe, self.settings.seed, len(texts))
            simulator = Simulator(self.pipe, plan, texts, self.settings.guidance, noise)
            found = search(simulator, calls, self.oracle_trials, advance)
        for policy in wanted:
            assert policy.calls is not None
            job = Job(
                label="oracle",
                method=Schedules(computed=tuple(found[policy.calls])),
                solver=solver,
                steps=setting.steps,
            )
            [run] = self._jobs([job], texts)
            self._enter(setting, policy, run)

    def _enter(self, setting: Setting, policy: Policy, run: Run) -> None:
        """Writes one result into the document, in the place of an older one."""
        result = _result(setting, policy, run)
        others = [r for r in self.document["results"] if _key(r)[:4] != _key(result)[:4]]
        self.document["results"] = [*others, result]
        write(self.document, self.state)


def _id(solver: str, steps: int, policy: Policy) -> tuple[Any, ...]:
    return solver, steps, policy.family, policy.label, repr(policy.method)


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("solver", "steps", "policy", "setting", "method"))


def _result(setting: Setting, policy: Policy, run: Run) -> dict[str, Any]:
    """One entry of the document, the pictures judged by those of the full run."""
    reference = setting.plain.images[: len(run.images)]
    decibels = psnr(run.images, reference)
    calls = sum(run.nfe) / len(run.nfe)
    timed = max(run.sizes) == max(setting.plain.sizes)
    seconds, plain = run.median_seconds, setting.plain.median_seconds
    return {
        "solver": setting.solver,
        "steps": setting.steps,
        "policy": policy.family,
        "setting": policy.label,
        "method": repr(policy.method),
        "calls": calls,
        "ratio": setting.steps / calls,
        "psnr": mean_psnr(decibels),
        "psnr_p10": percentile(decibels, 0.1),
        "ssim": sum(values := ssim(run.images, reference)) / len(values),
        "seconds": seconds if timed else None,
        "plain_seconds": plain if timed else None,
        "speedup": plain / seconds if timed else None,
        "images": {
            "calls": [round(n, 3) for n in run.nfe],
            "psnr": [round(min(value, 100.0), 3) for value in decibels],
        },
    }
