"""The losses of early exits, as functions of what they compare.

Ours, on a frozen model, with the excess error e_i of exit i against the whole model's output:

    L_head = sum_i w_t e_i^2 / m_it            w_t = (S_t g_t)^2 / mean, m_it: running mean of e_i^2
    L_uem  = sum_i rho_0.5(q50_i, ln e_i) + rho_0.9(q90_i, ln e_i)

with the pinball loss rho_tau(q, y) = max(tau (y - q), (tau - 1) (y - q)), least at the quantile.

AdaDiff's (Tang et al., eq. 4 to 7), with the output g_i of the head after layer i and the true
noise eps:

    u^_i  = tanh |g_i - eps|
    L_u   = sum_i || u_i - u^_i ||^2
    L_UAL = sum_{i < L} (1 - u_i) || g_i - eps ||^2
    L_all = L_simple + lambda L_u + beta L_UAL
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def pinball(quantile: Tensor, value: Tensor, tau: float) -> Tensor:  # [n], [n] -> []
    """The mean of rho_tau."""
    ahead = value - quantile
    return torch.maximum(tau * ahead, (tau - 1) * ahead).mean()


@dataclass(frozen=True, kw_only=True)
class AdaDiffLoss:
    """The terms that are added to L_simple.

    Attributes:
        weigh_u: lambda, of L_u.
        weigh_layers: beta, of L_UAL.
        batch_weights: As in the released code: a layer's weight in L_UAL is the mean of 1 - u_i
            over the whole batch, the weights of all layers add up to 1, and their gradient trains
            the uncertainty too. Otherwise each sample has weights of its own, without a gradient.
        mean_over_layers: As there: L_u is the mean over layers, not the sum.
    """

    weigh_u: float = 1.0
    weigh_layers: float = 1.0
    batch_weights: bool = False
    mean_over_layers: bool = False

    def __call__(
        self,
        u: Tensor,  # [L - 1, B, ...]: broadcasts against errors
        errors: Tensor,  # [L - 1, B, ...]: g_i - eps
    ) -> tuple[Tensor, Tensor]:  # [], []
        """``lambda L_u`` and ``beta L_UAL``, each a sum over layers of means over the rest."""
        label = errors.detach().abs().tanh()
        by_layer = (u - label).square().flatten(1).mean(1)  # [L - 1]
        loss_u = by_layer.mean() if self.mean_over_layers else by_layer.sum()
        squares = errors.square().flatten(2).mean(2)  # [L - 1, B]
        certain = 1 - u.flatten(2).mean(2)  # [L - 1, B]
        if self.batch_weights:
            weights = certain.mean(1)
            loss_layers = (weights / weights.sum() * squares.mean(1)).sum()
        else:
            loss_layers = (certain.detach() * squares).mean(1).sum()
        return self.weigh_u * loss_u, self.weigh_layers * loss_layers
