"""The exit score: what a probe says of a row's hidden states.

    s_bp = 1/N sum_n sigmoid(w_p . z_bn + beta_bp)        z = LN(h), or h itself

The fused operator has no backward: where a gradient is wanted, plain torch forms the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sidestep import kernels

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
    if torch.is_grad_enabled() and any(x.requires_grad for x in (h, weight, bias)):
        return _differentiable(h, weight, bias, normalise)
    beta = bias.expand(len(h), -1).contiguous()
    return kernels.exit_score(
        h.detach(), weight.detach(), beta.detach(), normalize=normalise, eps=EPS
    )


def _differentiable(h: Tensor, weight: Tensor, bias: Tensor, normalise: bool) -> Tensor:
    z = h.float()
    if normalise:
        z = functional.layer_norm(z, z.shape[-1:], eps=EPS)
    bias = bias if bias.ndim == 1 else bias[:, None, :]
    return torch.sigmoid(functional.linear(z, weight) + bias).mean(1)
