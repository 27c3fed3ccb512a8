"""Why a scheduler could not be compiled, in one sentence that names the setting to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class NotLinearError(ValueError):
    """A scheduler is not a linear program over its latent, the model's outputs and the noise."""


@dataclass(frozen=True)
class _Reason:
    applies: Callable[[str, Mapping[str, Any]], bool]  # (class name, its config)
    sentence: str


def _has(key: str, *values: object) -> Callable[[str, Mapping[str, Any]], bool]:
    return lambda name, settings: settings.get(key) in (values or (True,))


def _named(*names: str) -> Callable[[str, Mapping[str, Any]], bool]:
    return lambda name, settings: name in names


def _repeats_last_sigma(name: str, settings: Mapping[str, Any]) -> bool:
    return settings.get("final_sigmas_type") == "sigma_min" and any(
        settings.get(f"use_{grid}_sigmas") for grid in ("karras", "exponential", "beta")
    )


# By class, for what no setting can mend; `explain` takes the first that applies.
_BY_CLASS = (
    _Reason(
        _named(
            "AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler",
            "EntropyBoundScheduler", "VQDiffusionScheduler",
        ),
        "it samples discrete tokens, not latents",
    ),
    _Reason(
        _named("PiflowScheduler"),
        "its model output is n_grid times as wide as the latent, and a plan reads one of its size",
    ),
    _Reason(
        _named("KarrasVeScheduler"),
        "its pipeline draws the noise itself and passes step() arguments that depend on it; "
        "use EDMEulerScheduler or HeunDiscreteScheduler with s_churn instead",
    ),
    _Reason(
        _named("RePaintScheduler"),
        "its step() also mixes in original_image through a mask, which a plan has no place for",
    ),
    _Reason(
        _named("HeliosDMDScheduler"),
        "its pipeline draws the noise itself and passes it to step(); use HeliosScheduler",
    ),
)  # fmt: skip

# By setting; consulted once the probe has failed, and the first that applies is named.
_BY_SETTING = (
    _Reason(
        _has("thresholding"),
        "thresholding=True takes a quantile of the latent; set thresholding=False",
    ),
    _Reason(
        _has("clip_sample"),
        "clip_sample=True clamps the predicted sample; set clip_sample=False",
    ),
    _Reason(
        _has("clip_denoised"),
        "clip_denoised=True clamps the predicted sample; set clip_denoised=False",
    ),
    _Reason(
        _has("variance_type", "learned", "learned_range"),
        "a learned variance is read from extra channels of the model's output; set variance_type "
        "to a fixed one ('fixed_small' for DDPM, 'fixed_small_log' for UnCLIP, None elsewhere)",
    ),
    _Reason(
        lambda name, s: s.get("solver_order") == 3 and "sde" in str(s.get("algorithm_type")),
        "diffusers has no working third order for the SDE algorithms; set solver_order=2",
    ),
    _Reason(
        lambda name, s: (
            "UniPC" in name and s.get("solver_type") == "bh1"
            and s.get("final_sigmas_type") == "zero"
        ),
        "UniPC's bh1 divides zero by zero at a final sigma of zero; "
        "set final_sigmas_type='sigma_min' or solver_type='bh2'",
    ),
    _Reason(
        lambda name, s: (
            "UniPC" in name and s.get("predict_x0") is False
            and s.get("final_sigmas_type") == "zero"
        ),
        "UniPC with predict_x0=False divides by a final sigma of zero; "
        "set final_sigmas_type='sigma_min' or predict_x0=True",
    ),
    _Reason(
        lambda name, s: (
            s.get("lower_order_final") is False and s.get("final_sigmas_type") == "zero"
        ),
        "a step of order two or more cannot end at a sigma of zero; "
        "set lower_order_final=True or final_sigmas_type='sigma_min'",
    ),
    _Reason(
        _repeats_last_sigma,
        "with final_sigmas_type='sigma_min' this grid repeats its last sigma, and the step "
        "between them divides by zero; set final_sigmas_type='zero'",
    ),
)  # fmt: skip


def refusal(name: str) -> str | None:
    """Why a scheduler of this class can never be compiled, or None."""
    return next((reason.sentence for reason in _BY_CLASS if reason.applies(name, {})), None)


def explain(name: str, settings: Mapping[str, Any], symptom: str) -> NotLinearError:
    """The error for a scheduler that failed its probe.

    Args:
        name: The scheduler's class.
        settings: Its config.
        symptom: What was observed, for a failure that no known setting explains.
    """
    for reason in _BY_SETTING:
        if reason.applies(name, settings):
            return NotLinearError(f"Plan.from_scheduler: {name}: {reason.sentence}")
    return NotLinearError(f"Plan.from_scheduler: {name} cannot be compiled: {symptom}")
