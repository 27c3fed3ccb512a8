"""What exits could save if the true errors were known, and whether the score knows anything.

The pipeline runs in full while every exit's output is compared with the model's, which gives the
damage d_bki = W_k e_bki of each row b, step k and exit i. The oracle is the cheapest choice

    minimise sum_bk depth_i(b,k)    subject to    1/B sum_bk d_bk,i(b,k) <= E

`gate` compares it with the static plan, i(b, k) = i(k), of the same mean damage, and asks whether
the score tells the rows of one step apart:

    rank = mean over k, i of Spearman(q50_bki, e_bki)_b

Errors are those along the full trajectory. In the first step all rows are at the static plan's
exit, as nobody knows then which rows of a batch are branches of one picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sidestep.adapters.calling import own_size
from sidestep.errors import UserError
from sidestep.runtime.exits.file import Exits
from sidestep.runtime.exits.plan import cheapest, weights_of
from sidestep.training.exits_fit import Fit, Learned
from sidestep.training.exits_measure import spearman
from sidestep.training.exits_record import Call, Choose, Recorder

RANK, SAVING = 0.3, 0.05
"""From where on a score, and an oracle, are worth the trouble of per-sample exits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """Full trajectories, looked at from every exit.

    Attributes:
        errors: ``[B, T, K]`` RMS error of the guided output at each exit.
        foretold: ``[B, T, K]`` q50 of its logarithm.
        weights: ``[T]`` W_k.
        depths: ``[K + 1]`` blocks of each exit, and of the whole model.
    """

    errors: np.ndarray
    foretold: np.ndarray
    weights: np.ndarray
    depths: tuple[int, ...]

    @property
    def damages(self) -> np.ndarray:  # [B, T, K + 1]
        """What each exit does to the finished latents; the whole model does nothing."""
        damages = self.weights[:, None] * self.errors
        return np.concatenate([damages, np.zeros_like(damages[..., :1])], -1)

    def first(self, rows: int) -> Seen:
        """Of the first rows."""
        return Seen(
            errors=self.errors[:rows],
            foretold=self.foretold[:rows],
            weights=self.weights,
            depths=self.depths,
        )


@torch.no_grad()
def look(
    pipe: Any,
    exits: Exits,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch: int,
    on_batch: Callable[[str], None] | None = None,
) -> Seen:
    """Makes the pictures in full, from the noise that `run_jobs` gives them.

    Raises:
        UserError: No plans can be made for the pipeline's scheduler.
    """
    found: list[Seen] = []
    with Recorder(pipe, exits.after) as recorder:
        for first in range(0, len(prompts), batch):
            chunk = list(prompts[first : first + batch])
            seeds = range(seed + first, seed + first + len(chunk))
            arguments = {
                "prompt": chunk,
                "num_inference_steps": steps,
                "guidance_scale": guidance,
                "generator": [torch.Generator().manual_seed(number) for number in seeds],
                "output_type": "latent",
                **own_size(pipe),
            }
            calls = recorder.run(arguments, len(chunk), _whole(len(chunk)), lambda _, h: h)
            found.append(_seen(recorder, exits, calls))
            if on_batch is not None:
                on_batch("")
    return Seen(
        errors=np.concatenate([each.errors for each in found]),
        foretold=np.concatenate([each.foretold for each in found]),
        weights=found[0].weights,
        depths=found[0].depths,
    )


def _seen(recorder: Recorder, exits: Exits, calls: Sequence[Call]) -> Seen:
    """What one run of the pipeline shows."""
    weights = weights_of(exits, recorder.course)
    if weights is None or len(weights) != len(calls):
        raise UserError(
            f"bench exits: {type(recorder.pipe.scheduler).__name__} does not say how log-SNR rises "
            "over its steps, expected a solver with one model call a step"
        )
    assert exits.translators and exits.uncertainty
    learned = Learned(
        translators=exits.translators, probes=exits.probes, uncertainty=exits.uncertainty
    )
    fit = Fit(recorder, learned, recorder.course, seed=0)
    told = [[fit.foretell(call, exit) for exit in range(len(exits.after))] for call in calls]
    return Seen(
        errors=_stack([[square.sqrt() for square, _ in step] for step in told]),
        foretold=_stack([[quantiles[:, 0] for _, quantiles in step] for step in told]),
        weights=weights,
        depths=(*exits.after, exits.blocks),
    )


def _whole(rows: int) -> Choose:
    """The whole model for all rows."""
    none: list[int | None] = [None] * rows
    return lambda _: none


def _stack(values: list[list[torch.Tensor]]) -> np.ndarray:  # [T][K] of [B] -> [B, T, K]
    stacked = torch.stack([torch.stack(step, -1) for step in values], 1)
    return stacked.double().cpu().numpy()


def static(damages: np.ndarray, depths: Sequence[int], budget: float) -> list[int]:  # [T]
    """The best plan for all rows alike: of ``[B, T, K + 1]`` damages the mean keeps the budget."""
    return cheapest(damages.mean(0), depths, budget)


def oracle(
    damages: np.ndarray,  # [B, T, K + 1]
    depths: Sequence[int],  # [K + 1]
    first: int,
    budget: float,
) -> np.ndarray:  # [B, T]
    """The cheapest plan row by row whose damage is the budget in the mean over rows.

    Args:
        damages: Of which the last are 0.
        depths: Blocks of each exit.
        first: The exit of all rows in the first step.
        budget: E.
    """
    rows, steps = damages.shape[:2]
    rest = rows * budget - float(damages[:, 0, first].sum())
    chosen = cheapest(damages[:, 1:].reshape(rows * (steps - 1), -1), depths, rest)
    plan = np.array(chosen, dtype=int).reshape(rows, steps - 1)
    return np.concatenate([np.full((rows, 1), first), plan], 1)


def rank(seen: Seen) -> float:
    """Spearman's correlation of foretold and true error among the rows of one step."""
    pairs = [
        (torch.from_numpy(seen.foretold[:, k, i]), torch.from_numpy(seen.errors[:, k, i]))
        for k in range(seen.errors.shape[1])
        for i in range(seen.errors.shape[2])
    ]
    return float(np.mean([spearman(foretold, error) for foretold, error in pairs]))


def gate(seen: Seen, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Whether per-sample exits are worth it: an entry for each budget of the static plan."""
    damages, cost = seen.damages, np.array(seen.depths, dtype=float)
    known, entries = rank(seen), []
    for budget in budgets:
        plan = static(damages, seen.depths, budget)
        spent = float(damages[:, range(len(plan)), plan].sum(1).mean())
        best = oracle(damages, seen.depths, plan[0], spent)
        blocks = {"static": float(cost[plan].mean()), "oracle": float(cost[best].mean())}
        saving = 1 - blocks["oracle"] / blocks["static"]
        entries.append(
            {
                "budget": budget, "damage": spent, "rank": known, "layers_static": blocks["static"],
                "layers_oracle": blocks["oracle"], "saving": saving,
                "passed": bool(known >= RANK and saving >= SAVING),
            }
        )  # fmt: skip
    return entries


def verdict(entries: Sequence[Mapping[str, Any]]) -> str:
    """The mode that the gate says should be the default."""
    return "sample" if entries and all(entry["passed"] for entry in entries) else "static"
