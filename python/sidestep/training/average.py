"""The exponential moving average of the parameters, which is what every training here saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Average:
    """Exponential moving average of parameters; its first steps average over fewer."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.steps = parameters, decay, 0
        self.shadow = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the parameters' present values into the average."""
        self.steps += 1
        decay = min(self.decay, self.steps / (10 + self.steps))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Puts the average in place of the parameters, and the parameters back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Any]:
        """The parameters and their average, for a checkpoint."""
        parameters = [parameter.detach() for parameter in self.parameters]
        return {"steps": self.steps, "parameters": parameters, "shadow": self.shadow}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Takes parameters and average from what `state` gave."""
        self.steps = state["steps"]
        mine = [*self.parameters, *self.shadow]
        for tensor, kept in zip(mine, [*state["parameters"], *state["shadow"]], strict=True):
            tensor.copy_(kept)

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, shadow in zip(self.parameters, self.shadow, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)
