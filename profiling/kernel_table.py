"""Regenerates docs/kernels.md: what the Triton kernels move and need, computed without a GPU.

    python profiling/kernel_table.py             # writes the page
    python profiling/kernel_table.py --check     # exits 1 where the page (or --page FILE) is wrong

Compiles every kernel ahead of time for sm_80, sm_90 and sm_100 (tests/kernels/aot_compile_*.py),
counts the memory instructions of the PTX, and takes registers from the cubin.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers_step import Operation, operations
from roofline import GPUS, SIZE, by_arithmetic, microseconds, occupancy, step_bytes

from sidestep.runtime.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
PROGRAMS = ("solver_step", "parareal", "exits")
VERSIONS = r"\b(?:triton|diffusers) \d[\w.+]*"
COLUMNS, FREE = 11, (5, 7, 9, 10)  # of the compilers' table; registers and what follows from them


@dataclass(frozen=True)
class Kernel:
    """What the roofline counts of one compiled variant.

    Attributes:
        name: The operator.
        what: The variant, in words.
        block: Elements that a program takes.
        traffic: Bytes of device memory that an element costs.
        operations: On an element, in fp32.
        reread: Bytes an element that a program reads of what all programs share, so that they
            come from the cache.
    """

    name: str
    what: str
    block: int
    traffic: int
    operations: float
    reread: int = 0


STEP2, STEP1 = "R2 G2 fp16", "R2 G1 bf16"
GRAM, CORRECT = "gram V3", "correct R2"
SCORE, COMPACT, DECIDE = "score D1152 k8 bf16", "compact bf16", "decide"
V, R, K, WIDTH, TOKENS = 3, 2, 8, 2048, 2
HIDDEN = 1152
"""Width of the hidden states that the exit kernels are shown for: DiT-XL/2."""


def step(branches: int, dtype: str) -> Kernel:
    """u: G products; M and E: R+1 of each; a scale, the sizes of the step and of the error."""
    count = 2 * branches + 2 * (R + 1) * (R + 1) + 5
    guidance = "guidance" if branches > 1 else "no guidance"
    what = f"{R} registers, {guidance}, {dtype}"
    return Kernel("solver_step", what, 1024, step_bytes(R, branches, dtype), count)


KERNELS = {
    STEP2: step(2, "fp16"),
    STEP1: step(1, "bf16"),
    # V differences, and a multiply-add for each pair of them
    GRAM: Kernel("difference_gram", f"{V} vectors, fp32", 1024, 2 * V * 4, V + V * (V + 1)),
    # reads new and old (R+1 each), fine (R) and register 0; writes R
    CORRECT: Kernel(
        "parareal_correct_", f"{R} registers, fp32", 1024, 4 * (2 * (R + 1) + 2 * R + 1),
        (R + 1) + 2 * R * (R + 1) + R + 5,
    ),
    # a mean, a difference, a square and K products, on lanes up to the next power of two
    SCORE: Kernel(
        "exit_score", f"{K} probes of {HIDDEN}, bf16", WIDTH * TOKENS, SIZE["bf16"],
        (4 + 2 * K) * WIDTH / HIDDEN, K * 4 // TOKENS,
    ),
    COMPACT: Kernel("exit_compact_", "bf16, of a row that leaves", 2048, 4 * SIZE["bf16"], 0),
}  # fmt: skip


@dataclass(frozen=True)
class Latent:
    """One latent, and the transformer tokens of it (patches of 2x2; Flux packs them already)."""

    name: str
    shape: tuple[int, ...]
    tokens: int
    branches: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


LATENTS = (
    Latent("SD", (4, 64, 64), 32 * 32, 2),
    Latent("SDXL", (4, 128, 128), 64 * 64, 2),
    Latent("Flux, packed", (4096, 64), 4096, 1),
    Latent("video", (16, 13, 60, 90), 13 * 30 * 45, 2),
)


def compiled() -> dict[str, Any]:
    """What Triton's compiler makes of every variant that the tests look at."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found: dict[str, Any] = {}
    for program in PROGRAMS:
        command = [sys.executable, f"aot_compile_{program}.py"]
        done = subprocess.run(
            command, cwd=ROOT / "tests" / "kernels", env=environment, check=True,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        found |= json.loads(done.stdout)
    return found


def bytes_in_ptx(variant: Mapping[str, Any], kernel: Kernel) -> float:
    """Of the 128-bit accesses: those of elements. Narrow ones are a few per program."""
    wide = sum(variant["accesses"].get(f"{way}.global.v4.b32", 0) for way in ("ld", "st"))
    return wide * 16 * variant["threads"] / kernel.block


def needs(variant: Mapping[str, Any], arch: int) -> str:
    """Registers, spills, shared memory, occupancy and its limit, as cells of a table."""
    (gpu,) = (gpu for gpu in GPUS if gpu.arch == arch)
    resources, shared, threads = variant["resources"], variant["shared"], variant["threads"]
    share, limit = occupancy(gpu, threads, resources["REG"], shared)
    spills = resources["STACK"] + resources["LOCAL"]
    return f"{resources['REG']} | {spills} | {shared} | {threads} | {share:.0%} | {limit}"


def compiled_table(found: Mapping[str, Any]) -> list[str]:
    """One line a kernel and architecture."""
    lines = [
        "| kernel | variant | GPU | bytes an element: roofline | in PTX | registers | spills "
        "| shared | threads | occupancy | limited by |",
        "|---" * COLUMNS + "|",
    ]
    for key, kernel in KERNELS.items():
        for gpu in GPUS:
            variant = found[f"sm_{gpu.arch} {key}"]
            moved = f"{bytes_in_ptx(variant, kernel):g}"
            moved += f" ({kernel.reread} from cache)" if kernel.reread else ""
            lines.append(
                f"| `{kernel.name}` | {kernel.what} | {gpu.name} | {kernel.traffic} | {moved} "
                f"| {needs(variant, gpu.arch)} |"
            )
    for gpu in GPUS:
        variant = found[f"sm_{gpu.arch} {DECIDE}"]
        lines.append(
            f"| `exit_decide` | one program for all rows | {gpu.name} | - | - "
            f"| {needs(variant, gpu.arch)} |"
        )
    return lines


def _times(traffic: float, operations: float = 0) -> str:
    return " | ".join(
        f"{microseconds(gpu, traffic, operations):.2f}"
        + "*" * by_arithmetic(gpu, traffic, operations)
        for gpu in GPUS
    )


def step_table(theirs: Mapping[int, Sequence[Operation]]) -> list[str]:
    """The fused step beside diffusers' own: bytes, and the least time each can take."""
    names = [gpu.name for gpu in GPUS]
    lines = [
        f"| latent | elements | kernels | KB | {' | '.join(f'{name}, us' for name in names)} "
        f"| diffusers: kernels | KB | {' | '.join(f'{name}, us' for name in names)} | bytes |",
        "|---" * (8 + 2 * len(GPUS)) + "|",
    ]
    for latent in LATENTS:
        kernel = KERNELS[STEP2 if latent.branches == 2 else STEP1]
        ours = kernel.traffic
        steps = theirs[latent.branches]
        each = sum(step.read + step.written for step in steps)
        n = latent.elements
        lines.append(
            f"| {latent.name} {'x'.join(map(str, latent.shape))} | {n} | 1 | {n * ours / 1e3:.0f} "
            f"| {_times(n * ours, n * kernel.operations)} | {len(steps)} | {n * each / 1e3:.0f} "
            f"| {_times(n * each)} | {each / ours:.1f}x |"
        )
    return lines


def other_table() -> list[str]:
    """The other kernels at the same latents: a row of the correction, a row of hidden states."""
    lines = [
        f"| latent | kernel | elements | KB | {' | '.join(f'{gpu.name}, us' for gpu in GPUS)} |",
        "|---" * (4 + len(GPUS)) + "|",
    ]
    for latent in LATENTS:
        for key in (GRAM, CORRECT, SCORE, COMPACT):
            hidden = key in (SCORE, COMPACT)
            n, kernel = latent.tokens * HIDDEN if hidden else latent.elements, KERNELS[key]
            size = f"{latent.tokens}x{HIDDEN} = {n}" if hidden else str(n)
            lines.append(
                f"| {latent.name} | `{kernel.name}` | {size} | {n * kernel.traffic / 1e3:.0f} "
                f"| {_times(n * kernel.traffic, n * kernel.operations)} |"
            )
    return lines


def operations_table(steps: Sequence[Operation]) -> list[str]:
    """What diffusers does, in order, and how that was found out."""
    lines = [
        "## How diffusers' bytes were counted",
        "",
        "Eager PyTorch runs one kernel an operation, and each reads its operands and writes its "
        "result. A dispatch mode (`profiling/diffusers_step.py`) writes down the operations of "
        "the step that `sidestep bench step` times: `u + g (c - u)`, "
        "`DPMSolverMultistepScheduler.step` at order two, and the `cat` that makes the next input "
        "of a guidance pair. Views move nothing; scalars stay on the host and are left out, and "
        f"so is a cache (diffusers {version('diffusers')}). Bytes an element, fp16, in order:",
        "",
        "| operation | bytes read | bytes written |",
        "|---" * 3 + "|",
    ]
    lines += [f"| {step.name} | {step.read:g} | {step.written:g} |" for step in steps]
    read, written = sum(s.read for s in steps), sum(s.written for s in steps)
    return [*lines, f"| **{len(steps)} kernels** | **{read:g}** | **{written:g}** |"]


def page(found: Mapping[str, Any]) -> str:
    """The page."""
    theirs = {2: operations(torch.float16, 2), 1: operations(torch.bfloat16, 1)}
    published = "; ".join(
        f"{gpu.name} {gpu.bandwidth / 1e12:g} TB/s and {gpu.flops / 1e12:g} TFLOP/s" for gpu in GPUS
    )
    lines = [
        "# The Triton kernels: bytes, registers, occupancy, roofline",
        "",
        "Made by `python profiling/kernel_table.py`. **Nothing on this page was measured on a "
        "GPU.** Bytes are counted in the PTX, registers are ptxas', occupancy and times are "
        f"computed: time is bytes over the published bandwidth of memory ({published}), or, "
        "where that is longer (marked *), operations over half the published fp32 rate, as "
        "nothing is contracted. No kernel reaches either, and the cost of starting a kernel is "
        "left out. `bash profiling/ncu.sh` shows the real figures on a machine with a GPU "
        "([how](profiling.md)).",
        "",
        "## What the compiler made",
        "",
        f"triton {version('triton')}, for sm_80, sm_90 and sm_100. `roofline` counts every operand "
        "of a kernel once; `in PTX` is 16 bytes for each 128-bit access of a thread, times "
        "threads, over the elements of a block: the two have to agree. Occupancy follows from "
        "registers, threads and shared memory by the limits of a multiprocessor (64 warps, 32 "
        "blocks, 65536 registers, 164 KB of shared memory on the A100 and 228 KB on the others). "
        "`exit_score` also reads the probes, the same for all programs; `exit_compact_` reads and "
        "writes a row that leaves and the survivor that fills its place, and nothing of other "
        "rows. `exit_decide` moves a few bytes a row.",
        "",
        *compiled_table(found),
        "",
        "## The step, beside diffusers'",
        "",
        "One image, DPM-Solver++ 2M, from the model's output to its next input, guidance included "
        "(Flux: guidance is distilled into the model). Ours keeps its state in fp32 and writes "
        "the step size and the error estimate too. Where the time is below some microseconds it "
        "is the number of kernels that decides, not the bytes; small latents stay in the L2 "
        "cache, and are faster than this.",
        "",
        *step_table(theirs),
        "",
        "## The other kernels",
        "",
        "One row of each: a boundary of SRDS for the parareal kernels, the hidden states of one "
        f"image for the exit kernels, as if of a transformer {HIDDEN} wide on patches of 2x2.",
        "",
        *other_table(),
        "",
        *operations_table(theirs[2]),
        "",
    ]
    return "\n".join(lines)


def comparable(text: str, exact: bool) -> list[str]:
    """The lines of a page that have to agree with another's, without versions.

    Args:
        text: The page.
        exact: Whether the same compiler made both: another may take other registers.
    """
    lines = re.sub(VERSIONS, "", text).splitlines()
    if exact:
        return lines
    rows = (line.split(" | ") for line in lines)
    return [
        " | ".join(cell for i, cell in enumerate(row) if len(row) != COLUMNS or i not in FREE)
        for row in rows
    ]


def differences(committed: str, computed: str) -> list[str]:
    """Where two pages disagree, as lines of a diff."""
    exact = re.findall(VERSIONS, committed)[:1] == re.findall(VERSIONS, computed)[:1]
    pages = comparable(committed, exact), comparable(computed, exact)
    return list(difflib.unified_diff(*pages, "committed", "computed", lineterm="", n=0))


def main() -> None:
    """Writes the page, or checks it."""
    parser = argparse.ArgumentParser(description="The page about the Triton kernels.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/kernels.md")
    options = parser.parse_args()
    computed = page(compiled())
    if not options.check:
        write_whole(options.page, computed.encode())
        return
    wrong = differences(options.page.read_text(), computed)
    if wrong:
        print(*wrong, sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
