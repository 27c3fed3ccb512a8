"""One generation under a profiler: torch's here, or Nsight around the process.

The trace has torch's operators, and the ranges of `sidestep.runtime.ranges` among them.  On a GPU a
range is what the host did: kernels that it launched are in rows of their own, under the same name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from sidestep.adapters.catalogue import make_scheduler
from sidestep.adapters.enable import enable
from sidestep.errors import UserError
from sidestep.runtime import ranges
from sidestep.runtime.summary import Summary
from sidestep.sampling import Job, check_steps, make_call


@dataclass(frozen=True)
class Span:
    """One range: its name, and where it was, in seconds from the beginning of the generation."""

    name: str
    start: float
    end: float

    @property
    def kind(self) -> str:
        """``step`` of ``step/3``, ``fine`` of ``fine[0:8]``."""
        return self.name.split("/")[0].split("[")[0]


@dataclass(frozen=True)
class Operator:
    """One of torch's operators: how often, and milliseconds of its own in all."""

    name: str
    calls: int
    cpu: float
    device: float


@dataclass(frozen=True)
class Trace:
    """What one generation was made of.

    Attributes:
        seconds: Wall-clock, which the profiler lengthens.
        spans: Its ranges, by start.
        operators: By their own time, the longest first.
        summary: Of the method.
    """

    seconds: float
    spans: list[Span]
    operators: list[Operator]
    summary: Summary

    def kinds(self) -> dict[str, tuple[int, float]]:
        """Of each kind of range: how many, and seconds in all (of fine solves side by side)."""
        found: dict[str, tuple[int, float]] = {}
        for span in self.spans:
            count, seconds = found.get(span.kind, (0, 0.0))
            found[span.kind] = count + 1, seconds + span.end - span.start
        return found


@dataclass
class _Recorder:
    """Hears of ranges, and makes user annotations of torch's trace of them."""

    spans: list[Span] = field(default_factory=list)
    origin: float = field(default_factory=time.perf_counter)

    def start(self, name: str) -> tuple[str, float, record_function]:
        annotation = record_function(name)
        annotation.__enter__()
        return name, time.perf_counter(), annotation

    def end(self, started: tuple[str, float, record_function]) -> None:
        name, start, annotation = started
        self.spans.append(Span(name, start - self.origin, time.perf_counter() - self.origin))
        annotation.__exit__(None, None, None)


def trace(
    pipe: Any, job: Job, prompts: list[str], *, guidance: float, seed: int, out: Path
) -> Trace:
    """The second of two equal generations, under torch's profiler.

    Args:
        pipe: A text-to-image pipeline.
        job: How; with a method.
        prompts: One batch.
        guidance: Scale of classifier-free guidance.
        seed: Image i starts from seed + i.
        out: The file for ``chrome://tracing`` or https://ui.perfetto.dev.

    Raises:
        UserError: The job does not fit the pipeline.
    """
    cuda = pipe.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda

    def traced(make: Callable[[], Any], summary: Callable[[], Summary]) -> Trace:
        with profile(activities=activities) as profiler:
            recorder = _Recorder()
            with ranges.heard_by(recorder):
                make()
                if cuda:
                    torch.cuda.synchronize(pipe.device)
            seconds = time.perf_counter() - recorder.origin
        _export(profiler, out)
        names = {span.name for span in recorder.spans}
        operators = [
            Operator(e.key, e.count, e.self_cpu_time_total / 1e3, e.self_device_time_total / 1e3)
            for e in profiler.key_averages()
            if e.key not in names
        ]
        operators.sort(key=lambda one: one.device or one.cpu, reverse=True)
        spans = sorted(recorder.spans, key=lambda span: span.start)
        return Trace(seconds, spans, operators, summary())

    return _second(pipe, job, prompts, guidance, seed, traced)


def for_nsight(pipe: Any, job: Job, prompts: list[str], *, guidance: float, seed: int) -> Summary:
    """The second of two equal generations, between cudaProfilerStart and cudaProfilerStop.

    Raises:
        UserError: The model is not on a GPU.
    """
    if pipe.device.type != "cuda":
        raise UserError(f"--nsight: the model is on {pipe.device}, expected it on a CUDA device")

    def bracketed(make: Callable[[], Any], summary: Callable[[], Summary]) -> Summary:
        torch.cuda.synchronize(pipe.device)
        with torch.cuda.profiler.profile():
            make()
            torch.cuda.synchronize(pipe.device)
        return summary()

    return _second(pipe, job, prompts, guidance, seed, bracketed)


def _second(
    pipe: Any,
    job: Job,
    prompts: list[str],
    guidance: float,
    seed: int,
    watch: Callable[[Callable[[], Any], Callable[[], Summary]], Any],
) -> Any:
    """What ``watch(make, summary)`` returns, after one generation that nobody watches."""
    own = pipe.scheduler

    def make() -> Any:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        return make_call(pipe, job, prompts, guidance, generators)()

    try:
        pipe.scheduler = make_scheduler(job.solver, job.grid, own)
        check_steps(job, pipe.scheduler)
        with enable(pipe, job.method) as handle:
            make()
            return watch(make, handle.summary)
    finally:
        pipe.scheduler = own


def _export(profiler: profile, out: Path) -> None:
    """Writes through a temporary file, so that no half trace is ever left."""
    partial = out.with_name(f".{out.stem}.{os.getpid()}.json")
    try:
        profiler.export_chrome_trace(str(partial))
        partial.replace(out)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--out: cannot write {out}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
