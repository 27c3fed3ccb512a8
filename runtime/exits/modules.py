"""The parts of an exit: what takes hidden states to the head, and what says how wrong that is.

    translator     h' = h + A_i LN(h) + a_i                       A_i = 0, a_i = 0 at first
    probes         s = exit score of w_ip, beta_ip(lambda) = v_ip . tau(lambda) + b_ip
    uncertainty    (q50, q90) = W2_i tanh(W1_i f + c_i) + d_i     of ln e_i

The translator is a tuned lens (Belrose et al. 2023): the model's own head reads h'. The features f
of a row are the mean of its scores over the guidance branches, their spread, and lambda; e_i is the
RMS error of the guided output. tau embeds lambda = ln(alpha / sigma) of the step, which says what
the timestep says and is the same for every scheduler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from sidestep.runtime.exits.score import EPS, exit_score

FREQUENCIES = 8
TIME = 2 * FREQUENCIES
"""Numbers of tau: sine and cosine at 1/8, 1/4, ... 16 radians a unit of lambda."""

_FARTHEST = 12.0  # lambda, beyond which a schedule's end is as good as pure


_Own = TypeVar("_Own", bound="Parts")


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Tensors that move together."""

    def to(self: _Own, device: torch.device, dtype: torch.dtype | None = None) -> _Own:
        """The same elsewhere."""
        moved = {f.name: getattr(self, f.name).to(device, dtype) for f in fields(self)}
        return type(self)(**moved)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Translators(Parts):
    """One for each exit."""

    matrix: Tensor  # [K, D, D]: A
    offset: Tensor  # [K, D]: a

    def __call__(self, exit: int, h: Tensor) -> Tensor:  # [n, N, D]
        """h' of rows that leave there."""
        z = functional.layer_norm(h, h.shape[-1:], eps=EPS)
        return h + functional.linear(z, self.matrix[exit], self.offset[exit])


@dataclass(frozen=True, kw_only=True, eq=False)
class Probes(Parts):
    """P for each exit."""

    weight: Tensor  # [K, P, D]
    time: Tensor  # [K, P, TIME]
    bias: Tensor  # [K, P]

    def __call__(
        self, exit: int, h: Tensor, log_snr: Tensor, *, normalise: bool = True
    ) -> Tensor:  # [n, P]
        """The scores of rows at one exit.

        Args:
            exit: Which.
            h: ``[n, N, D]`` hidden states.
            log_snr: ``[]`` lambda of the step, or ``[n]``.
            normalise: Whether the probes read LN(h).
        """
        beta = functional.linear(embed_time(log_snr), self.time[exit], self.bias[exit])
        return exit_score(h, self.weight[exit], beta, normalise=normalise)


@dataclass(frozen=True, kw_only=True, eq=False)
class Uncertainty(Parts):
    """A small network for each exit, on the scores of `Probes`."""

    inner: Tensor  # [K, 2 P + 3, units]: W1 and, last, c
    outer: Tensor  # [K, units + 1, 2]: W2 and, last, d

    def __call__(
        self,
        exit: int,
        scores: Tensor,  # [branches, rows, P]
        log_snr: Tensor,  # [] or [rows]
    ) -> Tensor:  # [rows, 2]
        """q50 and q90 of the logarithm of every row's error.

        Sums rather than products of matrices: a row's result does not depend on how many there are.
        """
        scaled = clamp_log_snr(log_snr).expand(scores.shape[1]) / 4
        f = torch.cat(
            [
                scores.mean(0),
                scores.amax(0) - scores.amin(0),
                torch.stack([scaled, scaled.square()], 1),
            ],
            1,
        )
        inner, outer = self.inner[exit], self.outer[exit]
        units = ((f[:, :, None] * inner[:-1]).sum(1) + inner[-1]).tanh()
        return (units[:, :, None] * outer[:-1]).sum(1) + outer[-1]


def clamp_log_snr(log_snr: Tensor) -> Tensor:
    """lambda in fp32 within what the parts can tell apart."""
    return log_snr.float().clamp(-_FARTHEST, _FARTHEST)


def embed_time(log_snr: Tensor) -> Tensor:  # [...] -> [..., TIME]
    """tau: sines and cosines of lambda."""
    octaves = torch.arange(FREQUENCIES, device=log_snr.device) - 3
    angles = clamp_log_snr(log_snr)[..., None] * octaves.exp2()
    return torch.cat([angles.sin(), angles.cos()], -1)


def zero_translators(exits: int, width: int) -> Translators:
    """Translators that do nothing yet."""
    return Translators(matrix=torch.zeros(exits, width, width), offset=torch.zeros(exits, width))


def random_probes(exits: int, probes: int, width: int, generator: torch.Generator) -> Probes:
    """Probes in random directions, blind to the time, whose scores are spread around 1/2."""
    weight = torch.randn(exits, probes, width, generator=generator) / math.sqrt(width)
    return Probes(
        weight=weight, time=torch.zeros(exits, probes, TIME), bias=torch.zeros(exits, probes)
    )


def random_uncertainty(
    exits: int, probes: int, units: int, generator: torch.Generator
) -> Uncertainty:
    """Networks that say 0 for both quantiles, whatever they see."""
    inner = torch.randn(exits, 2 * probes + 3, units, generator=generator) / math.sqrt(2 * probes)
    return Uncertainty(inner=inner, outer=torch.zeros(exits, units + 1, 2))
