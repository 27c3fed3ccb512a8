"""One picture of the bundled model on several processes, and the time against one of them.

    python -m torch.distributed.run --nproc-per-node 2 examples/srds_two_processes.py

Rank 0 first samples alone, step by step, while the others wait.  Then all ranks do it together in
two ways: each takes blocks of the trajectory (SRDS), or, of two ranks, a branch of the guidance.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import sidestep
from sidestep.metrics import psnr


def main() -> None:
    """Samples three times, and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", default="frog on a bicycle")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the same on every rank")
    parser.add_argument("--blocks", type=int, help="of the trajectory (default: by the steps)")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--max-iterations", type=int)
    parser.add_argument("--width", type=int, help="most evaluations in a call (default: all)")
    given = vars(parser.parse_args())
    prompt, steps = given.pop("prompt"), given.pop("steps")
    guidance, seed = given.pop("guidance"), given.pop("seed")

    dist.init_process_group("gloo")
    pipe = sidestep.load_pipeline("emoji-sd")
    pipe.set_progress_bar_config(disable=True)

    def generate() -> tuple[Tensor, float]:
        """The picture ``[1, 3, H, W]`` in [0, 1], and the seconds that it took."""
        begun = time.perf_counter()
        picture = pipe(
            prompt, num_inference_steps=steps, guidance_scale=guidance, output_type="pt",
            generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        return picture, time.perf_counter() - begun

    alone = generate() if dist.get_rank() == 0 else None
    dist.barrier()
    if alone is not None:
        print(f"one process, {steps} calls in a row: {alone[1]:.2f} s", flush=True)

    def share(name: str, **how: Any) -> None:
        """All ranks make the picture; rank 0 says what it took."""
        with sidestep.enable(pipe, driver="whole", **how) as handle:
            generate()  # compiles the scheduler
            picture, seconds = generate()
        if alone is None:
            return
        summary = handle.summary()
        print(
            f"{name} on {dist.get_world_size()} processes: {seconds:.2f} s, "
            f"{alone[1] / seconds:.2f}x as fast, {summary.ticks} calls of rank 0, "
            f"PSNR {psnr(picture, alone[0])[0]:.1f} dB, iterations: {summary.iterations[0]}",
            flush=True,
        )

    with sidestep.Ranks() as ranks:
        share("SRDS", method=sidestep.SRDS(**given), ranks=ranks)
    if dist.get_world_size() == 2:
        with sidestep.Ranks(guidance_ranks=2) as ranks:
            share("guidance", ranks=ranks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
