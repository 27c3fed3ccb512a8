"""One picture of the bundled model on several processes, and the time against one of them.

    python -m torch.distributed.run --nproc-per-node 2 examples/srds_two_processes.py

Rank 0 first samples alone, step by step, while the others wait.  Then all ranks do it together in
two ways: each takes blocks of the trajectory (SRDS), or, of two ranks, a branch of the guidance.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from sidestep import SRDS, Engine, Plan, Request, Result, load_pipeline
from sidestep.adapters.denoiser import GuidedDenoiser, decode, first_noise
from sidestep.metrics import psnr
from sidestep.runtime.engine import Batch
from sidestep.runtime.ranks import Ranks


def main() -> None:
    """Samples three times, and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", default="frog on a bicycle")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--blocks", type=int, help="of the trajectory (default: by the steps)")
    parser.add_argument("--max-iterations", type=int)
    parser.add_argument("--width", type=int, help="most evaluations in a call (default: all)")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    pipe = load_pipeline("emoji-sd")
    text = GuidedDenoiser(pipe, [options.prompt], options.guidance).embeddings
    plan = Plan.from_scheduler(pipe.scheduler, options.steps)
    noise = first_noise(pipe, options.seed, 1)
    request = Request(
        plan,
        plan.initial_scale * noise,
        text,
        guidance=(1 - options.guidance, options.guidance),
        method=SRDS(
            blocks=options.blocks,
            tolerance=options.tolerance,
            max_iterations=options.max_iterations,
            width=options.width,
        ),
    )

    def model(batch: Batch) -> Tensor:
        output: Tensor = pipe.unet(batch.x, batch.t, batch.conditioning).sample
        return output

    def show(name: str, result: Result | None, seconds: float) -> None:
        """One line, from the rank that has sampled alone."""
        if serial is None or result is None:
            return
        line = f"{name}: {seconds:.2f} s, {alone_seconds / seconds:.2f}x as fast"
        if result is not serial:
            pictures = decode(pipe, result.x), decode(pipe, serial.x)
            line += f", {result.ticks} calls of rank 0, PSNR {psnr(*pictures)[0]:.1f} dB"
            line += f", iterations: {result.summary.iterations[0]}"
        print(line, flush=True)

    alone = replace(request, method=None)
    serial, alone_seconds = timed(lambda: one_process(alone, model))
    show(f"one process, {options.steps} calls in a row", serial, alone_seconds)
    with Ranks() as ranks:
        show(f"SRDS on {ranks.size} processes", *timed(lambda: ranks.run(request, model)))
    if dist.get_world_size() == 2:
        with Ranks(guidance_ranks=2) as ranks:
            show("guidance on 2 processes", *timed(lambda: ranks.run(alone, model)))
    dist.destroy_process_group()


@torch.no_grad()
def one_process(request: Request, model: Callable[[Batch], Tensor]) -> Result | None:
    """The same on rank 0 alone."""
    if dist.get_rank() != 0:
        return None
    engine = Engine(request.x.shape[1:], buckets=(2,))
    engine.submit(request)
    for batch in engine:
        engine.complete(batch, model(batch))
    (result,) = engine.results()
    return result


def timed(run: Callable[[], Result | None]) -> tuple[Result | None, float]:
    """Runs it, and the seconds that it took; all ranks begin and end together."""
    dist.barrier()
    begun = time.perf_counter()
    result = run()
    dist.barrier()
    return result, time.perf_counter() - begun


if __name__ == "__main__":
    main()
