"""``sidestep bench step``: the fused solver step against diffusers, and against a memory copy.

Both sides do the same job in the same run, in turns: from the model's output of both guidance
branches and the latent to the next latent of DPM-Solver++ 2M. diffusers does ``u + g (c - u)`` and
``DPMSolverMultistepScheduler.step``; ours is one call of `sidestep.kernels.solver_step`, the plan
compiled from that very scheduler. Nothing is timed unless the results agree.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sidestep import _native
from sidestep.kernels import PreparedStep, config, reference
from sidestep.report.environment import environment
from sidestep.report.progress import progress
from sidestep.runtime.plan import Plan

STEPS = 25
GUIDANCE = 7.5
MEGABYTE = 2**20
COPY_BYTES = 64 * MEGABYTE
# Relative, after a whole trajectory of fp32 roundings on both sides (3e-7 was measured).
AGREEMENT = 1e-5
STATS_AGREEMENT = 1e-5


@dataclass(frozen=True)
class Size:
    """One latent shape, as the model's output comes: a guidance pair of it."""

    name: str
    shape: tuple[int, ...]  # [batch, channels, ...]
    dtype: torch.dtype = torch.float32


SIZES = (
    Size("SD 64x64", (1, 4, 64, 64)),
    Size("SD 64x64, batch 4", (4, 4, 64, 64)),
    Size("SD 64x64, bf16", (1, 4, 64, 64), torch.bfloat16),
    Size("SDXL 128x128", (1, 4, 128, 128)),
    Size("Flux 128x128", (1, 16, 128, 128)),
    Size("video 21x60x104", (1, 16, 21, 60, 104)),
)


class Ours:
    """The fused step over one plan, with everything that a loop prepares once."""

    def __init__(
        self,
        plan: Plan,
        noise: Tensor,  # [batch, ...]
        output: Tensor,  # [2 * batch, ...] model dtype
    ) -> None:
        rows, D = len(noise), noise[0].numel()
        self.noise, self.output, self.size = noise.view(rows, D).float(), output, (2, rows, D)
        self.registers = torch.empty(rows, plan.registers, D)
        self.weights = torch.tensor([[1.0 - GUIDANCE, GUIDANCE]]).expand(rows, 2).contiguous()
        self.table = plan.table()
        self.index = torch.zeros(rows, dtype=torch.int64)
        self.stats = torch.empty(rows, 2)
        self.take = PreparedStep(
            self.registers, self.weights, self.table, self.index, None, self.stats
        )
        self.begin()

    def begin(self) -> None:
        """Back to the first step."""
        self.registers.zero_()
        self.registers[:, 0] = self.noise

    def step(self, k: int) -> None:
        """Step k, from the model's output to the next latent in registers[:, 0]."""
        self.index.fill_(k)
        self.take(self.output)

    def reference_step(self, k: int) -> None:
        """The same in plain torch."""
        outputs = self.output.view(self.size).unbind(0)
        reference.solver_step(
            self.registers, outputs, self.weights, None, self.table, self.index.fill_(k),
            None, None, self.stats,
        )  # fmt: skip


class Theirs:
    """The guidance arithmetic of a pipeline and diffusers' scheduler."""

    def __init__(
        self,
        scheduler: Any,  # a DPMSolverMultistepScheduler
        noise: Tensor,  # [batch, ...]
        output: Tensor,  # [2 * batch, ...] model dtype
    ) -> None:
        self.scheduler, self.noise, self.output = scheduler, noise, output
        self.begin()

    def begin(self) -> None:
        """Back to the first step."""
        self.scheduler.set_timesteps(STEPS)
        self.x = self.noise.to(self.output.dtype)

    def step(self, k: int) -> None:
        """Step k, from the model's output to the next latent in x."""
        u, c = self.output.chunk(2)
        guided = u + GUIDANCE * (c - u)
        self.x = self.scheduler.step(guided, self.scheduler.timesteps[k], self.x).prev_sample


def run(*, repeats: int = 200) -> dict[str, Any]:
    """Compares results, then measures.

    Args:
        repeats: Timed steps of each case, at least.

    Returns:
        The JSON document: ``results`` has microseconds per step and size,
        ``speedup_sd`` is the ratio at 4x64x64, ``bandwidth_fraction`` the ratio of bytes per
        second to a copy's at 64 MB.

    Raises:
        RuntimeError: The results differ from the reference's or from diffusers'.
    """
    with torch.inference_mode(), _same_threads(), progress(len(SIZES) + 2, "bench step") as advance:
        scheduler = their_scheduler()
        plan = Plan.from_scheduler(scheduler, STEPS)
        _check(scheduler, plan)
        advance("results agree")
        results = []
        for size in SIZES:
            results.append(_measure(size, scheduler, plan, repeats))
            advance(size.name)
        bandwidth = _bandwidth(plan, max(5, repeats // 5))
        advance("bandwidth")
        return {
            "command": "bench step",
            "environment": environment() | _kernel_environment(),
            "guidance": GUIDANCE,
            "results": results,
            "bandwidth": bandwidth,
            "speedup_sd": results[0]["speedup"],
            "bandwidth_fraction": bandwidth["fraction"],
        }


def print_report(document: dict[str, Any]) -> None:
    """Prints the document as a table a person can read."""
    where = document["environment"]
    table = Table(
        title=f"One guided DPM-Solver++ 2M step, microseconds ({where['kernels']}, "
        f"{where['simd']}, {where['threads']} threads)"
    )
    for column in ("latent", "dtype", "diffusers", "sidestep", "speed-up"):
        table.add_column(column, justify="left" if column in ("latent", "dtype") else "right")
    for row in document["results"]:
        times = (f"{row['diffusers_us']:.1f}", f"{row['sidestep_us']:.1f}")
        table.add_row(row["size"], row["dtype"], *times, f"{row['speedup']:.1f}x")
    console = Console()
    console.print(table)
    rates = document["bandwidth"]
    console.print(
        f"64 MB of registers: {rates['sidestep_gb_per_s']:.1f} GB/s, a copy beside it "
        f"{rates['copy_gb_per_s']:.1f} GB/s: {rates['fraction']:.0%}"
    )


def their_scheduler() -> Any:
    """Stable Diffusion's schedule with DPM-Solver++ 2M."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        algorithm_type="dpmsolver++", solver_order=2,
    )  # fmt: skip


@contextmanager
def _same_threads() -> Iterator[None]:
    """Gives the native library as many threads as torch."""
    before = _native.num_threads()
    _native.set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        _native.set_num_threads(before)


def _kernel_environment() -> dict[str, Any]:
    backend = config.backend()
    return {
        "kernels": "native" if backend == "auto" else backend,
        "kernel_threads": _native.num_threads(),
        "native_build": _native.build_info(),
    }


def _inputs(size: Size) -> tuple[Tensor, Tensor]:
    """Unit noise [batch, ...] fp32 and a model output [2 * batch, ...] in the size's dtype."""
    make = torch.Generator().manual_seed(0)
    batch, *rest = size.shape
    noise = torch.randn(batch, *rest, generator=make)
    return noise, torch.randn(2 * batch, *rest, generator=make).to(size.dtype)


def _check(scheduler: Any, plan: Plan) -> None:
    """Every step equals the reference bit for bit, and the trajectory is diffusers'."""
    for size in SIZES[:4]:
        noise, output = _inputs(size)
        ours, exact = Ours(plan, noise, output), Ours(plan, noise, output)
        theirs = Theirs(scheduler, noise, output.float())
        for k in range(STEPS):
            ours.step(k)
            exact.reference_step(k)
            theirs.step(k)
            if not torch.equal(ours.registers, exact.registers):
                _refuse(size, k, "registers differ from the reference's")
            if not torch.allclose(ours.stats, exact.stats, rtol=STATS_AGREEMENT, atol=0):
                _refuse(size, k, "stats differ from the reference's")
        x = theirs.x.reshape(len(noise), -1)
        distance = float((ours.registers[:, 0] - x).norm() / x.norm())
        if not distance < AGREEMENT:
            _refuse(size, STEPS, f"the latent is {distance:.1e} away from diffusers', relatively")


def _refuse(size: Size, k: int, what: str) -> None:
    raise RuntimeError(f"bench step: {size.name}, step {k}: {what}; no numbers reported")


def _measure(size: Size, scheduler: Any, plan: Plan, repeats: int) -> dict[str, Any]:
    """Medians over whole trajectories, one of diffusers' and one of ours in turns."""
    sides: list[Theirs | Ours] = [Theirs(scheduler, *_inputs(size)), Ours(plan, *_inputs(size))]
    times: list[list[int]] = [[], []]
    for round_ in range(1 + -(-repeats // STEPS)):
        for side, into in zip(sides, times, strict=True):
            side.begin()
            for k in range(STEPS):
                start = time.perf_counter_ns()
                side.step(k)
                into.append(time.perf_counter_ns() - start)
            if round_ == 0:  # warm-up
                into.clear()
    theirs, ours = (statistics.median(taken) / 1e3 for taken in times)
    return {
        "size": size.name,
        "shape": list(size.shape),
        "dtype": str(size.dtype).removeprefix("torch."),
        "steps": STEPS,
        "diffusers_us": theirs,
        "sidestep_us": ours,
        "speedup": theirs / ours,
    }


def _bandwidth(plan: Plan, repeats: int) -> dict[str, float]:
    """Bytes per second of a step on 64 MB of registers, and of a copy of 64 MB, in turns.

    Counted are the bytes that must move: registers read and written, outputs read.
    """
    R, k = plan.registers, STEPS // 2
    noise, output = _inputs(Size("64 MB", (1, COPY_BYTES // 4 // R)))
    ours = Ours(plan, noise, output)
    source = torch.randn(COPY_BYTES // 4)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    def step() -> None:
        ours.step(k)

    times: dict[str, list[int]] = {"copy": [], "step": []}
    for _ in range(1 + repeats):
        for name, work in (("copy", copy), ("step", step)):
            start = time.perf_counter_ns()
            work()
            times[name].append(time.perf_counter_ns() - start)
    moved = {"copy": 2 * COPY_BYTES, "step": 2 * COPY_BYTES + output.nbytes}
    rates = {name: [moved[name] / t for t in taken[1:]] for name, taken in times.items()}
    # Neighbours on the machine share the memory: each step is compared with the copy beside it.
    fractions = [ours / copy for ours, copy in zip(rates["step"], rates["copy"], strict=True)]
    return {
        "sidestep_gb_per_s": statistics.median(rates["step"]),
        "copy_gb_per_s": statistics.median(rates["copy"]),
        "fraction": statistics.median(fractions),
    }
