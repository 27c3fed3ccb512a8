"""Running a recorded trajectory over the ranks of a job, each of which has recorded the same one.

Every rank loops through its own pipeline, and then they meet.  What each has recorded is compared
by digests in the first word of the run, bit for bit: starting latents, noise, and the arguments of
the model.  Only the latents of rank 0 go into the run, but the others have made the first model
call with their own, and prompts are never sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sidestep.runtime.engine_request import Batch, Request, Result
from sidestep.runtime.identity import digest

if TYPE_CHECKING:
    from sidestep.adapters.trajectory_record import Trajectory
    from sidestep.runtime.ranks import Ranks

_DRAWN = ("starting latents", "noise of the steps")
_GIVEN = "arguments of the model"


def run_on_ranks(
    ranks: Ranks,
    trajectory: Trajectory,
    request: Request,
    model: Callable[[Batch], Tensor],
    dtype: torch.dtype,
) -> Result:
    """Runs a request together with all other ranks.

    Args:
        ranks: The ranks.
        trajectory: What the request was made of.
        request: The trajectory.
        model: As for the engine.
        dtype: Of the model's inputs and outputs.

    Raises:
        RankError: Something went wrong on a rank, or they were not given the same.
        ValueError: The pipeline is on another device than the ranks; or has another number of
            guidance branches than a team.
    """
    from sidestep.runtime.ranks import RankError

    if request.x.device != ranks.device:
        raise ValueError(
            f"enable: the latents are on {request.x.device}, expected {ranks.device}, the device "
            "of the ranks; pass it to Ranks(device=...)"
        )
    drawn: list[Tensor] = []
    if request.noise is not None:
        noise = {(k, j): z for k, j, z in _draws(request)}
        drawn, request = list(noise.values()), replace(request, noise=lambda k, j: noise[k, j])
    told = [f"{_DRAWN[0]} {digest([request.x])}", f"{_GIVEN} {_digest_of_calls(trajectory)}"]
    if drawn:
        told.insert(1, f"{_DRAWN[1]} {digest(drawn)}")
    try:
        return ranks.run(request, model, dtype=dtype, also=told)
    except RankError as error:
        raise RankError(f"{error}{_advice(str(error))}") from error


def _draws(request: Request) -> Iterable[tuple[int, int, Tensor]]:
    """All draws of a stochastic plan, in the order of its sampler."""
    counts, noise = request.plan.draws, request.noise
    assert counts is not None and callable(noise)
    for k, count in enumerate(counts):
        for j in range(int(count)):
            yield k, j, noise(k, j)


def _digest_of_calls(trajectory: Trajectory) -> str:
    """Of the model calls of all steps: their arguments, and how they are combined."""
    library = trajectory.library
    number = {id(known): i for i, known in enumerate(library.known)}
    order = [
        ([number[id(call.arguments)] for call in step.calls], sorted(step.places.items()))
        for step in trajectory.steps
    ]
    weights = [sorted(of.items()) for of in trajectory.weights]
    return digest([repr(order), [*library.leaves()], weights])


def _advice(sentence: str) -> str:
    """What to do, where ranks were not given the same."""
    if "expected the same as the rank before" not in sentence:
        return ""
    if any(f"{name} " in sentence for name in _DRAWN):
        return "; pass a generator with the same seed on every rank"
    if f"{_GIVEN} " in sentence:
        return "; pass the same prompts and settings on every rank"
    return ""
