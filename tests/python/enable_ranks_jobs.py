"""What the processes of test_enable_ranks.py run: see `ranks_jobs`."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from ranks_jobs import main
from tiny_pipelines import generate, tiny_sd
from torch import Tensor

from sidestep import SRDS, RankError, Ranks, disable, enable

STEPS = 10
CASES: dict[str, tuple[SRDS, str, dict[str, Any]]] = {
    "early": (SRDS(blocks=5, tolerance=1e-3), "DDIMScheduler", {}),
    "exact": (SRDS(blocks=4, exact=True), "DPMSolverMultistepScheduler", {}),
    "most": (SRDS(tolerance=0, max_iterations=2, width=1), "DDIMScheduler", {}),
    "stochastic": (SRDS(blocks=3, tolerance=1e-3), "DDIMScheduler", {"eta": 0.5}),
    "unguided": (SRDS(blocks=4), "EulerDiscreteScheduler", {"guidance_scale": 1.0}),
}

SPLIT = ("early", "stochastic")  # of the guidance


def build(scheduler: str = "DDIMScheduler") -> Any:
    """A pipeline whose model has the same bits in a batch of any size: one line after another."""
    pipe = tiny_sd()
    config = {**pipe.scheduler.config, "clip_sample": False}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    plain = pipe.unet.forward

    @functools.wraps(plain)
    def forward(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **more: Any) -> Any:
        times = torch.as_tensor(timestep).expand(len(sample))
        lines = zip(sample, times, encoder_hidden_states, strict=True)
        return (
            torch.cat([plain(x[None], t[None], text[None], **more)[0] for x, t, text in lines]),
        )

    pipe.unet.forward = forward
    return pipe


def made(pipe: Any, case: str, prompts: tuple[int, ...] = (1, 2), **how: Any) -> Tensor:
    """Its pictures."""
    return generate(pipe, list(prompts), **{"steps": STEPS, **CASES[case][2], **how})


def told(handle: Any, make: Callable[[], Tensor]) -> dict[str, Any]:
    """What a generation came to, as plain values."""
    begun = time.monotonic()
    try:
        x = make()
    except RankError as error:
        return {"error": str(error), "seconds": time.monotonic() - begun}
    summary = handle.summary()
    return {
        "x": x, "iterations": summary.iterations, "errors": summary.errors, "note": summary.note,
    }  # fmt: skip


def all_cases(found: dict[str, Any], ranks: Ranks) -> None:
    for case, (method, scheduler, _) in CASES.items():
        if ranks.team > 1 and case not in SPLIT:
            continue
        pipe = build(scheduler)
        with enable(pipe, method, ranks=ranks) as handle:
            found[case] = told(handle, functools.partial(made, pipe, case))


def at_call(number: int, what: Callable[[], object]) -> Callable[..., None]:
    """A hook of the model that does something at one of its calls."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == number:
            what()

    return hook


def raising() -> None:
    raise ValueError("out of paper")


def job_blocks(found: dict[str, Any]) -> None:
    """All cases; then inputs that differ, an error of one rank, and that the pipeline goes on."""
    with Ranks(timeout=30) as ranks:
        all_cases(found, ranks)
        pipe, odd = build(), ranks.rank == ranks.size - 1
        seeds = [torch.Generator().manual_seed(9 + i + odd) for i in range(2)]
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        differing: Mapping[str, dict[str, Any]] = {
            "other prompts": {"prompts": (1, 3) if odd else (1, 2), "latents": x},
            "other noise": {"generator": seeds},
            "other steps": {"steps": STEPS + odd},
            "other draws": {"generator": seeds, "latents": x, "eta": 0.5},
            "other images": {"num_images_per_prompt": 1 + odd},
        }
        with enable(pipe, CASES["early"][0], ranks=ranks) as handle:
            for name, how in differing.items():
                found[name] = told(handle, functools.partial(made, pipe, "early", **how))
            failing = pipe.unet.register_forward_pre_hook(at_call(2, raising)) if odd else None
            found["raised"] = told(handle, functools.partial(made, pipe, "early"))
            if failing is not None:
                failing.remove()
            found["again"] = told(handle, functools.partial(made, pipe, "early"))
        found["plain"] = {"x": made(pipe, "early")}


def job_guidance(found: dict[str, Any]) -> None:
    """Two ranks to a team."""
    with Ranks(guidance_ranks=2, timeout=30) as ranks:
        all_cases(found, ranks)
        pipe = build()
        if ranks.size == 2:
            with enable(pipe, driver="whole", ranks=ranks) as handle:
                found["serial"] = told(handle, functools.partial(made, pipe, "early"))
        with enable(pipe, CASES["early"][0], ranks=ranks) as handle:
            how = {"guidance_scale": 5.0 + (ranks.rank == 1)}
            found["other guidance"] = told(handle, functools.partial(made, pipe, "early", **how))


def job_dying(found: dict[str, Any]) -> None:
    """The last rank is killed in the middle; the pipelines of the others go on alone."""
    ranks, pipe = Ranks(timeout=20), build()
    handle = enable(pipe, CASES["early"][0], ranks=ranks)
    if ranks.rank == ranks.size - 1:
        kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
        pipe.unet.register_forward_pre_hook(at_call(3, kill))
    found["dead"] = told(handle, functools.partial(made, pipe, "early"))
    disable(pipe)
    found["plain"] = {"x": made(pipe, "early")}


if __name__ == "__main__":
    jobs = {"blocks": job_blocks, "guidance": job_guidance, "dying": job_dying}
    main(jobs, sys.argv[1], sys.argv[2:])
