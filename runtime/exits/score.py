"""The exit score: what a probe says of a row's hidden states.

    s_bp = 1/N sum_n sigmoid(w_p . z_bn + beta_bp)        z = LN(h), or h itself

One place for the plain torch form; a fused operator has the same arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6
"""Of the LayerNorm, which has no weights of its own."""


def exit_score(
    h: Tensor,  # [B, N, D]
    weight: Tensor,  # [P, D] fp32
    bias: Tensor,  # [B, P] or [P] fp32
    *,
    normalise: bool = True,
) -> Tensor:  # [B, P] fp32
    """The mean over tokens of every probe's sigmoid, in fp32."""
    z = h.float()
    if normalise:
        z = functional.layer_norm(z, z.shape[-1:], eps=EPS)
    bias = bias if bias.ndim == 1 else bias[:, None, :]
    return torch.sigmoid(functional.linear(z, weight) + bias).mean(1)
