"""The record of one trajectory: what the pipeline did at each step, checked as it comes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sidestep.adapters.capture import Call, CannotCapture, Library
from sidestep.adapters.capture_layout import (
    Layout,
    blocks_of,
    find_region,
    is_doubled,
    without_latents,
)
from sidestep.adapters.guidance import fit_weights
from sidestep.runtime.denoisers import RecordedStep
from sidestep.runtime.methods.criterion import Course
from sidestep.runtime.plan import Plan


@dataclass(kw_only=True, eq=False)
class Trajectory:
    """Everything that the engine needs.

    Attributes:
        plan: The sampler.
        course: What the scheduler says of it; None for what the plan shows.
        layout: Between the scheduler's latents and rows.
        start: ``[R, ...]``, the latents before the first step.
        stand_in: ``[S, ...]``, what the pipeline takes for the latents of the coming step.
        library: The arguments of the model calls.
        steps: The model calls of each step.
        weights: Of each step, by branch: ``[]``, or ``[F, 1, ...]`` where every frame has its own.
    """

    plan: Plan
    layout: Layout
    start: Tensor
    stand_in: Tensor
    library: Library
    course: Course | None = None
    steps: list[RecordedStep] = field(default_factory=list)
    weights: list[dict[int, Tensor]] = field(default_factory=list)

    @staticmethod
    def begin(plan: Plan, latents: Tensor, calls: Sequence[Call], combined: Tensor) -> Trajectory:
        """A trajectory that begins at ``latents``, ``[S, ...]``.

        Args:
            calls: Of the first step.
            combined: ``[S, ...]``, what the pipeline made of their probes.

        Raises:
            CannotCapture: Latents and model do not go together.
        """
        layout = Layout.between(latents, calls[0].sample)
        start = layout.inward(latents).detach().clone()
        if is_doubled(start) and _find_weights(layout.inward(combined), calls) is None:
            layout = replace(layout, copies=2)
            start = start[: len(start) // 2]
        return Trajectory(
            plan=plan,
            layout=layout,
            start=start,
            stand_in=latents.detach().clone(),
            library=Library(rows=len(start)),
        )

    def record(
        self, latents: Tensor, calls: Sequence[Call], helpers: Sequence[Call], combined: Tensor
    ) -> None:
        """Takes in one step, and makes up the latents after it.

        Args:
            latents: ``[S, ...]``, what the pipeline lets the scheduler step.
            calls: The model calls since the step before.
            helpers: The calls of networks that feed the model.
            combined: ``[S, ...]``, what the pipeline made of their probes.

        Raises:
            CannotCapture: The pipeline does something that cannot be taken over.
        """
        k = len(self.steps)
        if latents.shape != self.stand_in.shape or not torch.equal(latents, self.stand_in):
            raise CannotCapture(
                f"enable: the pipeline has changed the latents before step {k} (inpainting that "
                "blends, or a callback); the whole-trajectory driver computes them at the last "
                "step, use driver='stepwise'"
            )
        x = self.layout.inward(latents)
        scaled = float(self.plan.input_scales[k]) * x
        for call in (*helpers, *calls):
            region = find_region(call.sample, scaled.to(call.sample.dtype))
            if region is not None:
                call.arguments.region = region
                call.arguments.around = without_latents(call.sample, x, region)
        weights = self._weights(k, combined, calls)
        step = self.library.record(calls, helpers, first=k == 0)
        self.steps.append(step)
        self.weights.append(dict(zip(step.places, weights, strict=True)))
        shifted = self.start.flatten(1).roll(k + 1, dims=1).view_as(self.start)
        self.stand_in = self.layout.outward(shifted)

    def _weights(self, k: int, combined: Tensor, calls: Sequence[Call]) -> list[Tensor]:
        weights = _find_weights(self.layout.inward(combined), calls)
        limit = max(1e-4, 8 * torch.finfo(combined.dtype).eps)
        if weights is None or float((torch.stack(weights).sum(0).abs() - 1).abs().max()) > limit:
            raise CannotCapture(
                f"enable: at step {k} the pipeline does not combine its guidance branches with "
                "weights that add up to 1 (or -1) and are the same for all rows, perhaps because "
                "it scales the prediction by what is in it (guidance_rescale); the "
                "whole-trajectory driver needs that, use driver='stepwise'"
            )
        return weights

    def noise(self, latents: Tensor, generator: Any) -> Callable[[int, int], Tensor] | None:
        """The draws that the scheduler would have made, ``[R, ...]`` each, in its order."""
        if not self.plan.stochastic:
            return None
        first = self.steps[0].calls[0].output
        dtype = latents.dtype if first is None else first.dtype

        def draw(k: int, j: int) -> Tensor:
            drawn = randn_tensor(
                latents.shape, generator=generator, device=latents.device, dtype=dtype
            )
            return self.layout.inward(drawn).float()

        return draw


def _find_weights(
    combined: Tensor,  # [R, ...]
    calls: Sequence[Call],
) -> list[Tensor] | None:
    """The weight of each branch, in the order of the calls and of the blocks in them."""
    rows, shape = len(combined), combined.shape[1:]
    answers = [call.probe for call in calls if call.probe is not None]
    for answer in answers:
        if len(answer) % rows:
            raise CannotCapture(
                f"enable: the model has a batch of {len(answer)} for {rows} rows, expected a "
                "multiple; use driver='stepwise'"
            )
    probes = [block for answer in answers for block in blocks_of(answer, rows, shape)]
    weights = fit_weights(combined, probes)
    if weights is not None:
        return [torch.tensor(w, device="cpu") for w in weights]
    if combined.dim() < 5:
        return None
    frames = range(combined.shape[1])  # a guidance scale for every frame (Stable Video Diffusion)
    by_frame = [fit_weights(combined[:, f], [p[:, f] for p in probes]) for f in frames]
    known = [w for w in by_frame if w is not None]
    if len(known) < len(by_frame):
        return None
    extra = [1] * (combined.dim() - 2)
    return [torch.tensor(w, device="cpu").view(-1, *extra) for w in zip(*known, strict=True)]
