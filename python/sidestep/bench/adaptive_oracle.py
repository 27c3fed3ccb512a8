"""The oracle of ``sidestep bench adaptive``: which steps to compute, knowing how it ends.

For each prompt and each number of calls n, and with linear extrapolation as the rule of reuse:

1. The full trajectory is run; its outputs u_k and states are kept.
2. A run of skips from i1 + 1 to j - 1, after the computed steps i2 < i1, leads away from the full
   trajectory by Delta(i2, i1, j): exact, because no model is called inside it and the plan is
   linear.  What a deviation at step j does to the result, S_j, is measured: a run of two is
   skipped before j in a true run, the final distance divided by Delta; for eight j, the logarithm
   interpolated; S_K = 1.
3. Dynamic programming finds the set of n computed steps, step 0 among them, with the least sum
   over its runs of ``(S_j |Delta|)^2``.  That is exact for this sum, which itself is first-order:
   it ignores that deviations change what comes after them, and that they may cancel.
4. From there, and from the uniform pattern if that is closer, a local search with true runs: single
   computed steps move by one or two places as long as the final latent comes closer to the full
   run's, up to a given number of runs.

So it is an upper bound for schedules in practice, not a proof; and one for schedules, not for rules
of reuse: a better predictor than the line can pass it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestep.adapters.denoiser import GuidedDenoiser
from sidestep.bench.adaptive_policies import WARM_UP
from sidestep.runtime.methods.reuse import reuse_weights
from sidestep.runtime.plan import Plan

RULE = "linear"
PROBES = 8
"""Steps at which the effect on the result is measured."""

PROBE_RUN = 2
"""Steps that are skipped for that."""

TOGETHER = 4
"""Moves of one prompt that are tried at once."""


@dataclass
class Path:
    """A trajectory that was run, with its state before every step so that others can branch off.

    Attributes:
        row: The prompt.
        computed: Its computed steps.
        registers: ``[R, ...]`` before each step, and at the end: K + 1 of them.
        fresh: Before each step the last two computed (step, output ``[...]``), newest first.
        error: Root mean square of the final latent's distance to the full run's.
    """

    row: int
    computed: frozenset[int]
    registers: list[Tensor]
    fresh: list[list[tuple[int, Tensor]]]
    error: float = 0.0

    def before(self, step: int) -> Path:
        """The part before ``step``."""
        return Path(self.row, self.computed, self.registers[: step + 1], self.fresh[: step + 1])


class Simulator:
    """Runs the prompts of a pipeline by a plan, each trajectory by its own schedule."""

    def __init__(self, pipe: Any, plan: Plan, prompts: list[str], guidance: float, noise: Tensor):
        """Encodes the prompts.

        Args:
            pipe: A Stable Diffusion pipeline.
            plan: Its scheduler, compiled.
            prompts: P prompts.
            guidance: The guidance scale.
            noise: ``[P, C, H, W]`` unit noise.
        """
        self.denoiser = GuidedDenoiser(pipe, prompts, guidance)
        self.embeddings = self.denoiser.embeddings.unflatten(0, (-1, len(prompts)))
        self.plan = plan
        self.matrices = torch.tensor(plan.matrices, dtype=torch.float32)
        self.steps = len(plan)
        self.log_snr = None if plan.log_snr is None else plan.log_snr.tolist()
        self.evaluations = 0
        everything = frozenset(range(self.steps))
        starts = []
        for row, x in enumerate(noise * plan.initial_scale):
            registers = torch.zeros(plan.registers, *x.shape)
            registers[0] = x
            starts.append(Path(row, everything, [registers], [[]]))
        self.full = self._complete(starts)

    def run(self, paths: list[Path]) -> list[Path]:
        """Completes begun trajectories and enters their errors."""
        for path in self._complete(paths):
            difference = path.registers[-1][0] - self.full[path.row].registers[-1][0]
            path.error = difference.square().mean().sqrt().item()
        return paths

    def _complete(self, paths: list[Path]) -> list[Path]:
        """Those that compute a step share one batch of the model."""
        for k in range(self.steps):
            here = [p for p in paths if len(p.registers) == k + 1]
            calling = [p for p in here if k in p.computed]
            outputs: Sequence[Tensor] = self._evaluate(calling, k).unbind() if calling else ()
            fresh = dict(zip(map(id, calling), outputs, strict=True))
            for p in here:
                self._advance(p, k, fresh.get(id(p)))
        return paths

    def _evaluate(self, paths: list[Path], k: int) -> Tensor:
        x = torch.stack([p.registers[k][0] for p in paths]) * float(self.plan.input_scales[k])
        rows = [p.row for p in paths]
        self.denoiser.embeddings = self.embeddings[:, rows].flatten(0, 1)
        self.evaluations += len(paths)
        return self.denoiser(x, float(self.plan.timesteps[k]))

    def _advance(self, path: Path, k: int, output: Tensor | None) -> None:
        fresh = path.fresh[k]
        if output is not None:
            fresh = [(k, output), *fresh[:1]]
        else:
            weights = reuse_weights(RULE, [step for step, _ in fresh], k, self.log_snr)
            output = sum(
                (w * u for w, (_, u) in zip(weights, fresh, strict=False)),
                start=torch.zeros_like(fresh[0][1]),
            )
        registers = path.registers[k]
        known = torch.cat([registers, output[None]])
        matrix = self.matrices[k][:, : len(known)]
        path.registers.append(torch.tensordot(matrix, known, dims=1))
        path.fresh.append(fresh)

    def branch(self, path: Path, computed: frozenset[int]) -> Path:
        """``path`` up to where another schedule differs from it, to be run."""
        first = min(path.computed ^ computed, default=self.steps)
        begun = path.before(first)
        begun.computed = computed
        return begun


def deviations(
    plan: Plan,
    outputs: Tensor,  # [K, D]
    log_snr: Sequence[float] | None,
) -> np.ndarray:  # [K, K, K + 1]
    """``|Delta(i2, i1, j)|``, root mean square, at ``[i2, i1, j]``; 0 where that is no schedule.

    With step 0 the only computed one, i2 = i1 = 0.

    Args:
        plan: The sampler: Delta' = M Delta + the column of u times the output's error.
        outputs: Of the full trajectory.
    """
    K, R = len(outputs), plan.registers
    matrices = torch.tensor(plan.matrices, dtype=torch.float32)
    found = np.zeros((K, K, K + 1))
    for i1 in range(K):
        known = [[0]] if i1 == 0 else [[i1, i2] for i2 in range(i1)]
        delta = torch.zeros(len(known), R, outputs.shape[1])
        for k in range(i1 + 1, K):
            lines = [reuse_weights(RULE, steps, k, log_snr) for steps in known]
            weights = torch.tensor(lines, dtype=torch.float32)
            wrong = weights[:, :1] * outputs[i1] - outputs[k]
            if i1:
                wrong += weights[:, 1:] * outputs[:i1]
            delta = matrices[k, :, :R] @ delta + matrices[k, :, R, None] * wrong[:, None]
            found[: len(known), i1, k + 1] = delta[:, 0].square().mean(1).sqrt().numpy()
    return found


def best_schedules(
    runs: np.ndarray,  # [K, K, K + 1]
    most: int,
) -> dict[int, tuple[int, ...]]:
    """The cheapest set of n computed steps, for every n from 1 to ``most``, step 0 among them.

    The state is (calls made, last two computed steps).

    Args:
        runs: At ``[i2, i1, j]`` the cost of skipping i1 + 1 to j - 1 after computing i2 and i1.
    """
    K = len(runs)
    table = np.full((K, K), math.inf)
    table[0, 0] = 0.0
    back: list[np.ndarray] = []  # back[m][i1, j]: the i2 that leads to (i1, j) best
    best: dict[int, tuple[int, ...]] = {}
    for n in range(1, most + 1):
        ends = table + runs[:, :, K]
        i2, i1 = (int(i) for i in np.unravel_index(np.argmin(ends), ends.shape))
        best[n] = _trace(back, i2, i1)
        following, origin = np.full((K, K), math.inf), np.zeros((K, K), dtype=np.int64)
        for last in range(K):
            reach = table[:, last, None] + runs[:, last, last + 1 : K]  # [i2, j]
            if reach.size:
                origin[last, last + 1 :] = reach.argmin(axis=0)
                following[last, last + 1 :] = reach.min(axis=0)
        back.append(origin)
        table = following
    return best


def _trace(back: list[np.ndarray], i2: int, i1: int) -> tuple[int, ...]:
    steps = [i1]
    for origin in reversed(back):
        steps.append(i2)
        i2, i1 = int(origin[i2, i1]), i2
    return tuple(reversed(steps))


def search(
    simulator: Simulator,
    calls: list[int],
    trials: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[int, list[tuple[int, ...]]]:
    """The oracle's schedule of every prompt for every number of calls.

    Args:
        trials: True runs of the local search, for each prompt and number of calls.
        advance: Called after every round of work, for a progress bar.
    """
    starts: list[dict[int, tuple[int, ...]]] = []
    for row in range(len(simulator.full)):
        starts.append(best_schedules(_costs(simulator, row), max(calls)))
        advance()
    found = {}
    for n in calls:
        paths = []
        for path in simulator.full:
            ways = [frozenset(starts[path.row][n]), uniform(n, simulator.steps)]
            tried = simulator.run([simulator.branch(path, way) for way in ways])
            paths.append(min(tried, key=lambda p: p.error))
        found[n] = [tuple(sorted(p.computed)) for p in _improve(simulator, paths, trials, advance)]
    return found


def uniform(calls: int, steps: int) -> frozenset[int]:
    """The first five steps, and as many others, evenly spaced."""
    head = min(WARM_UP, calls)
    rest = np.linspace(head - 1, steps - 1, calls - head + 1).round().astype(int)[1:]
    return frozenset({*range(head), *rest.tolist()})


def _costs(simulator: Simulator, row: int) -> np.ndarray:
    """``(S_j |Delta(i2, i1, j)|)^2`` of one prompt, ``[K, K, K + 1]``."""
    K, full = simulator.steps, simulator.full[row]
    outputs = torch.stack([full.fresh[k + 1][0][1].flatten() for k in range(K)])
    away = deviations(simulator.plan, outputs, simulator.log_snr)
    ends = sorted({int(j) for j in np.linspace(4, K - 1, PROBES).round()})
    trials = simulator.run(
        [simulator.branch(full, full.computed - set(range(j - PROBE_RUN, j))) for j in ends]
    )
    first = [j - PROBE_RUN for j in ends]
    effect = [
        math.log((p.error + 1e-12) / (away[k - 2, k - 1, j] + 1e-12))
        for k, j, p in zip(first, ends, trials, strict=True)
    ]
    return (away * np.exp(np.interp(np.arange(K + 1), [*ends, K], [*effect, 0.0]))) ** 2


def moves(computed: frozenset[int], steps: int) -> list[frozenset[int]]:
    """Schedules in which one computed step, not step 0, lies one or two places elsewhere."""
    found = []
    for distance in (1, -1, 2, -2):
        for step in sorted(computed - {0}):
            if 0 < step + distance < steps and step + distance not in computed:
                found.append(computed - {step} | {step + distance})
    return found


def _improve(
    simulator: Simulator, paths: list[Path], trials: int, advance: Callable[[], None]
) -> list[Path]:
    """Local search, all prompts at once; a prompt is done when no move helps it."""
    tried: list[set[frozenset[int]]] = [{p.computed} for p in paths]
    generator = np.random.default_rng(0)
    for _ in range(-(-trials // TOGETHER)):
        candidates: list[Path] = []
        for best, seen in zip(paths, tried, strict=True):
            new = [m for m in moves(best.computed, simulator.steps) if m not in seen]
            for i in generator.permutation(len(new))[:TOGETHER]:
                seen.add(new[i])
                candidates.append(simulator.branch(best, new[i]))
        for path in simulator.run(candidates):
            if path.error < paths[path.row].error:
                paths[path.row] = path
        advance()
    return paths
