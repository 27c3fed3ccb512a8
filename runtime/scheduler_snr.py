"""Where a scheduler's model calls lie on the logarithmic signal-to-noise axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def log_snr(
    scheduler: Any,
    timesteps: np.ndarray,  # [K]
    input_scales: np.ndarray,  # [K]
    begin_index: int = 0,
) -> np.ndarray | None:  # [K]
    """lambda = ln(alpha / sigma) at every call, read off a scheduler after ``set_timesteps``.

    Four conventions cover diffusers, told apart by what the scheduler has: the DPM-Solver family
    turns its own sigmas into alpha and sigma; the Euler family scales the model's input by
    ``1 / sqrt(sigma^2 + sigma_data^2)``; flow matching has ``t = sigma * N`` and
    ``alpha = 1 - sigma``; the DDPM family looks up ``alphas_cumprod[t]``.

    Returns:
        None where the scheduler follows none of them. Infinite at a pure end of the schedule.
    """
    K = len(timesteps)
    config = getattr(scheduler, "config", {})
    table = getattr(scheduler, "sigmas", None)
    sigmas = None
    if table is not None and len(table) >= begin_index + K:
        sigmas = _numbers(table[begin_index : begin_index + K])
    with np.errstate(divide="ignore", invalid="ignore"):
        if sigmas is not None and hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(torch.from_numpy(sigmas))
            return np.log(np.array(alpha / sigma, dtype=np.float64))
        if sigmas is not None and (input_scales != 1).any():
            variance = config.get("sigma_data", 1.0) ** 2
            implied = np.sqrt(1 / input_scales**2 - variance)
            listed = np.isclose(sigmas, implied, rtol=1e-3)  # not so between KDPM2's stages
            return -np.log(np.where(listed, sigmas, implied))
        length = config.get("num_train_timesteps", 0)
        if sigmas is not None and np.allclose(timesteps, sigmas * length, rtol=1e-5):
            return np.log((1 - sigmas) / sigmas)
        if hasattr(scheduler, "alphas_cumprod") and (timesteps == np.round(timesteps)).all():
            signal = _numbers(scheduler.alphas_cumprod)
            kept = signal[np.clip(timesteps, 0, len(signal) - 1).astype(np.int64)]
            return 0.5 * np.log(kept / (1 - kept))
    return None


def _numbers(table: Any) -> np.ndarray:
    """A scheduler's table; some keep theirs where the latents are, which numpy cannot read."""
    return torch.as_tensor(table).detach().cpu().double().numpy()
