"""Writes the bundled UNet as an ONNX file, with inputs x, t, text and output u, for the server.

python examples/cpp/export_unet.py unet.onnx
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from sidestep.models import load_pipeline


class Unet(nn.Module):
    """The UNet as a function of tensors only."""

    def __init__(self, unet: nn.Module) -> None:
        """Holds the diffusers module."""
        super().__init__()
        self.unet = unet

    def forward(
        self,
        x: Tensor,  # [N, 4, 16, 16]
        t: Tensor,  # [N]
        text: Tensor,  # [N, 24, 192]
    ) -> Tensor:  # [N, 4, 16, 16]
        """The predicted noise of each entry."""
        return self.unet(x, t, text, return_dict=False)[0]


def export(path: Path) -> None:
    """Exports it for any number of entries."""
    unet = load_pipeline("emoji-sd").unet.eval()
    inputs = (torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, 24, 192))
    names = ["x", "t", "text"]
    torch.onnx.export(
        Unet(unet),
        inputs,
        str(path),
        input_names=names,
        output_names=["u"],
        dynamic_axes={name: {0: "entries"} for name in [*names, "u"]},
        dynamo=False,
    )


if __name__ == "__main__":
    export(Path(sys.argv[1]))
