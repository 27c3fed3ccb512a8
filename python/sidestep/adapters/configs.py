"""Which scheduler configs `SidestepScheduler` can stand for; the rest are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REFUSED: dict[str, Any] = {
    "thresholding": False,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "sigma_data": None,
    "stochastic_sampling": False,
}
"""Settings that change what is sampled, and the value at which they do not."""


def refuse(config: Mapping[str, Any], flow: bool) -> None:
    """Refuses a config of diffusers that no solver of ours would honour.

    Args:
        config: A scheduler's config, with keys of earlier classes perhaps.
        flow: Whether it was recognised as a flow.

    Raises:
        ValueError: A setting cannot be honoured, or the config describes no noise schedule.
    """
    for setting, harmless in _REFUSED.items():
        value = config.get(setting, harmless)
        if value != harmless and value is not None:
            raise ValueError(
                f"SidestepScheduler: {setting} is {value!r} in the config, expected {harmless!r}"
            )
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"SidestepScheduler: timestep_type is {config['timestep_type']!r} in the config, "
            "expected 'discrete'"
        )
    if config and not flow and not {"beta_schedule", "trained_betas", "solver"} & set(config):
        raise ValueError(
            "SidestepScheduler: the config has neither beta_schedule nor shift, expected that of a "
            "discrete (DDPM-like) or flow-matching scheduler"
        )
