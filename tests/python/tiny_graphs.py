"""Pipelines whose model calls come from recorded graphs, and a UNet with the same bits anywhere."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from graph_recorder import Recorder
from tiny_pipelines import tiny_sd
from torch import Tensor

from sidestep.adapters.enable import Handle


class Elementwise(UNet2DConditionModel):
    """Element by element, so that a row's output is the same bits in any batch.

    Attributes:
        gain: A setting that its Python reads at every call.
    """

    gain = 0.8

    def forward(
        self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **_: Any
    ) -> Any:
        return UNet2DConditionOutput(sample=self.formula(sample, timestep, encoder_hidden_states))

    def formula(self, sample: Tensor, timestep: Any, text: Tensor) -> Tensor:
        told = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        shift = text[:, 0, 0] * 0.1 + told * 1e-4 + self.conv_in.bias[0]
        return (sample * self.gain + shift.view(-1, 1, 1, 1)).clamp(-3, 3) - sample.abs() * 0.05


def elementwise(network: type[Elementwise] = Elementwise) -> Any:
    """A tiny Stable Diffusion with it."""
    pipe = tiny_sd()
    pipe.unet.__class__ = network
    return pipe


def graphed(handle: Handle, recorder: Any = None) -> Recorder:
    """What the handle captures goes to a recorder from now on."""
    recorder = recorder or Recorder()
    handle._driver.graphs.device = recorder  # type: ignore[union-attr]
    return recorder


def counts(handle: Handle) -> tuple[int, int]:
    """Graphs captured and replayed in the last generation."""
    words = handle.summary().graphs.split()
    assert words[1::2] == ["captured,", "replayed"], handle.summary().graphs
    return int(words[0]), int(words[2])
