"""Roofline and occupancy of the Triton kernels, from what is published; nothing is measured here.

    time >= max(bytes / bandwidth, operations / rate)    occupancy = resident / possible warps

    python profiling/roofline.py 4x64x64 16x13x60x90 --dtype fp16 --branches 2 --registers 2

The rate is half of what is published for fp32, which counts a contracted multiply-add as two: our
kernels contract nothing. The step does about one operation a byte, and these GPUs five in the same
time, so that memory is its roof; eight probes of the exit score do more, and arithmetic is.
Limits of a multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities".
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SIZE = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes


@dataclass(frozen=True)
class GPU:
    """A device and the limits of one of its multiprocessors.

    Attributes:
        bandwidth: Of its memory, as published, in bytes a second.
        flops: In fp32, as published, a second.
        shared: Bytes of shared memory in one.
    """

    name: str
    arch: int
    bandwidth: float
    flops: float
    shared: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


# Datasheets: A100 80GB SXM, H100 SXM5, HGX B200 (an eighth).
GPUS = (
    GPU("A100", 80, 2.039e12, 19.5e12, 164 * 1024),
    GPU("H100", 90, 3.35e12, 67e12, 228 * 1024),
    GPU("B200", 100, 8.0e12, 75e12, 228 * 1024),
)
WARP = 32
REGISTER_UNIT = 256  # registers are handed out to a warp in such pieces,
WARP_UNIT = 4  # to as many warps in each of the four parts,
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # and so much shared memory is a block's overhead


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(gpu: GPU, threads: int, registers: int, shared: int) -> tuple[float, str]:
    """The share of a multiprocessor's warps that are resident at once, and what limits it.

    Args:
        gpu: The device.
        threads: Of a block.
        registers: Of a thread.
        shared: Bytes of a block.
    """
    warps = threads // WARP
    by_registers = gpu.registers // _up(registers * WARP, REGISTER_UNIT) // WARP_UNIT * WARP_UNIT
    limits = {
        "warps": gpu.warps // warps,
        "blocks": gpu.blocks,
        "registers": by_registers // warps,
        "shared memory": gpu.shared // _up(shared + SHARED_RESERVED, SHARED_UNIT),
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit] * warps / gpu.warps, limit


def step_bytes(registers: int, branches: int, dtype: str) -> int:
    """Of one element of `solver_step`: R fp32 registers and G outputs read, R and G written."""
    return 2 * 4 * registers + 2 * SIZE[dtype] * branches


def microseconds(gpu: GPU, traffic: float, operations: float = 0) -> float:
    """The least time for so many bytes and fp32 operations, none of them contracted."""
    return 1e6 * max(traffic / gpu.bandwidth, operations / (gpu.flops / 2))


def by_arithmetic(gpu: GPU, traffic: float, operations: float) -> bool:
    """Whether it is the operations that take longer."""
    return microseconds(gpu, 0, operations) > microseconds(gpu, traffic)


def shape(text: str) -> tuple[int, ...]:
    """``4x64x64`` as a tuple.

    Raises:
        ValueError: It is something else.
    """
    try:
        sizes = tuple(int(part) for part in text.split("x"))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ValueError(f"LATENT: got {text!r}, expected sizes such as 4x64x64")
    return sizes


def lines(latents: Sequence[tuple[int, ...]], traffic: int) -> Iterator[str]:
    """A Markdown table: the roofline time of each latent on each GPU."""
    yield f"| latent | elements | bytes | {' | '.join(f'{gpu.name}, us' for gpu in GPUS)} |"
    yield "|---" * (3 + len(GPUS)) + "|"
    for latent in latents:
        total = math.prod(latent) * traffic
        times = " | ".join(f"{microseconds(gpu, total):.2f}" for gpu in GPUS)
        yield f"| {'x'.join(map(str, latent))} | {math.prod(latent)} | {total} | {times} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of the fused step for the latents that are asked for."""
    parser = argparse.ArgumentParser(description="Roofline time of the fused step, computed.")
    parser.add_argument("latents", nargs="+", metavar="LATENT", help="such as 4x64x64")
    parser.add_argument("--registers", type=int, default=2, help="R of the plan")
    parser.add_argument("--branches", type=int, default=2, choices=(1, 2, 3), help="of guidance")
    parser.add_argument("--dtype", default="fp16", choices=sorted(SIZE), help="of the model")
    options = parser.parse_args(arguments)
    try:
        latents = [shape(text) for text in options.latents]
        if options.registers < 1:
            raise ValueError(f"--registers: got {options.registers}, expected 1 or more")
    except ValueError as error:
        sys.stderr.write(f"roofline: {error}\n")
        sys.exit(2)
    traffic = step_bytes(options.registers, options.branches, options.dtype)
    print(*lines(latents, traffic), sep="\n")


if __name__ == "__main__":
    main()
