"""Fits translators, probes and uncertainty to recorded model calls: L_head + L_uem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidestep.runtime.exits.modules import (
    Probes,
    Translators,
    Uncertainty,
    random_probes,
    random_uncertainty,
    zero_translators,
)
from sidestep.runtime.methods.criteria.carried_error import carried_error
from sidestep.runtime.methods.criterion import Course
from sidestep.training.exits_losses import pinball
from sidestep.training.exits_record import Call, Looking

MEMORY = 0.95
"""Decay of m_it, the running mean of e_i^2 by exit and step."""
LEAST = 1e-12
"""Added to e^2 before a logarithm is taken, or a quotient."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """What is trained: parameters on the model's device."""

    translators: Translators
    probes: Probes
    uncertainty: Uncertainty

    @classmethod
    def fresh(
        cls, exits: int, width: int, probes: int, units: int, seed: int, device: torch.device
    ) -> Learned:
        """Translators that do nothing, and the rest at random."""
        generator = torch.Generator().manual_seed(seed)
        parts: dict[str, Any] = {
            "translators": zero_translators(exits, width),
            "probes": random_probes(exits, probes, width, generator),
            "uncertainty": random_uncertainty(exits, probes, units, generator),
        }
        for name, part in parts.items():
            own = {key: nn.Parameter(t.to(device)) for key, t in part.tensors().items()}
            parts[name] = type(part)(**own)
        return cls(**parts)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of it."""
        parts = (self.translators, self.probes, self.uncertainty)
        tensors = [tensor for part in parts for tensor in part.tensors().values()]
        return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


class Fit:
    """The loss of what is learned, on calls of one course.

    Attributes:
        learned: The parameters.
        course: Of the trajectories.
    """

    def __init__(self, looking: Looking, learned: Learned, course: Course, seed: int) -> None:
        """Has seen nothing yet.

        Args:
            looking: The model.
            learned: The parameters.
            course: Of the trajectories.
            seed: Of the order in which calls are taken.
        """
        self.learned, self.course = learned, course
        self._looking = looking
        self._generator = torch.Generator().manual_seed(seed)
        weight = np.square(carried_error(course))
        self._weights = (weight / weight.mean()).tolist()  # w_t
        exits = len(learned.translators.matrix)
        self._means = np.full((exits, len(weight)), np.nan)  # m_it

    def loss(self, calls: Sequence[Call]) -> Tensor:  # []
        """L_head + L_uem of one of the calls."""
        call = calls[int(torch.randint(len(calls), (), generator=self._generator))]
        total = torch.zeros((), device=call.output.device)
        for exit in range(len(self._means)):
            square, quantiles = self.foretell(call, exit)
            label = (square.detach() + LEAST).log() / 2
            mean = self._mean(exit, call.step, float(square.detach().mean()))
            total = total + self._weights[call.step] / (mean + LEAST) * square.mean()
            total = total + pinball(quantiles[:, 0], label, 0.5)
            total = total + pinball(quantiles[:, 1], label, 0.9)
        return total

    def _mean(self, exit: int, step: int, square: float) -> float:
        """m_it, with one more value in it."""
        old = self._means[exit, step]
        self._means[exit, step] = square if np.isnan(old) else MEMORY * old + (1 - MEMORY) * square
        return float(self._means[exit, step])

    def foretell(self, call: Call, exit: int) -> tuple[Tensor, Tensor]:  # [rows], [rows, 2]
        """e_i^2 of every row, and what the network says of ln e_i."""
        assert self.course.log_snr is not None
        h = call.hidden[exit].float()
        square = self.error(call, self.learned.translators(exit, h))
        snr = torch.tensor(self.course.log_snr[call.step], device=h.device)
        scores = self.learned.probes(exit, h, snr).unflatten(0, (len(call.weights), call.rows))
        return square, self.learned.uncertainty(exit, scores, snr)

    def error(self, call: Call, states: Tensor) -> Tensor:  # [branches * rows, N, D] -> [rows]
        """e^2 of what the head makes of hidden states."""
        return call.guided_error(self.head(call, states))

    def head(self, call: Call, states: Tensor) -> Tensor:  # [branches * rows, N, D]
        """The output for hidden states."""
        states = states.to(self._looking.model.dtype)
        return self._looking.head(states, call.args, call.kwargs)
