"""Schedulers under which a criterion on step sizes means nothing, refused with the reason."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_NOISY_NAMES = (
    "ancestral",
    "sde",
    "ddpm",
    "lcm",
    "tcd",
    "sasolver",
    "repaint",
    "unclip",
    "vqdiffusion",
    "cmstochastic",
    "cosinedpm",
    "consistencydecoder",
    "scmscheduler",
    "heliosdmd",
    "cogvideoxdpm",
    "rfd4proteina",
)


def refuse_unsuitable(scheduler: SchedulerMixin) -> None:
    """Checks what can be known before the first step; `NoiseGuard` sees the rest.

    Raises:
        ValueError: The scheduler calls the model more than once a step, draws noise, or has no
            ``step`` that takes a ``sample`` of real numbers.
    """
    name = type(scheduler).__name__
    parameters = inspect.signature(getattr(type(scheduler), "step", refuse_unsuitable)).parameters
    if "sample" not in parameters:
        raise ValueError(f"enable: {name} has no `step` with an argument `sample` to measure it by")
    if "Long" in str(parameters["sample"].annotation):
        raise ValueError(
            f"enable: {name} steps whole tokens, and the change of a token has no size; use a "
            "scheduler of latents"
        )
    solver = _solver(scheduler)
    label = _label(scheduler)
    if getattr(scheduler, "order", 1) != 1 or solver == "heun":
        raise ValueError(
            f"enable: {label} calls the model twice a step, and half steps do not measure how fast "
            "the picture changes; use a multistep scheduler"
        )
    if adds_noise(scheduler):
        raise ValueError(
            f"enable: {label} adds noise at every step, which hides how fast the picture changes; "
            "use a deterministic scheduler"
        )
    if name == "PNDMScheduler" and not _setting(scheduler, "skip_prk_steps"):
        raise ValueError(
            f"enable: {name} begins with Runge-Kutta steps of four model calls each, which do not "
            "measure how fast the picture changes; set skip_prk_steps=True"
        )


def adds_noise(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler adds noise at its steps, as far as its name and settings say."""
    noisy = any(part in _label(scheduler).lower() for part in _NOISY_NAMES)
    return noisy or bool(_setting(scheduler, "stochastic_sampling"))


def _solver(scheduler: SchedulerMixin) -> str:
    return str(_setting(scheduler, "algorithm_type") or _setting(scheduler, "solver") or "")


def _label(scheduler: SchedulerMixin) -> str:
    solver = _solver(scheduler)
    return f"{type(scheduler).__name__} ({solver})" if solver else type(scheduler).__name__


def _setting(scheduler: SchedulerMixin, name: str) -> Any:
    """A setting of this class. A config also carries along those of the classes it came from."""
    if name not in inspect.signature(type(scheduler).__init__).parameters:
        return None
    config: Any = getattr(scheduler, "config", {})
    return config.get(name)


class NoiseGuard:
    """Raises where a scheduler's step has drawn random numbers: eta > 0, churn, unknown classes."""

    def __init__(self, scheduler: SchedulerMixin, generator: Any, device: torch.device) -> None:
        """Remembers all that the step can draw from; nothing is read from a device.

        Args:
            scheduler: Whose step is watched, for the message.
            generator: What the step was given: None, one generator or a list of them.
            device: Of the latents.
        """
        self.name = type(scheduler).__name__
        given = generator if isinstance(generator, list | tuple) else [generator]
        self.generators = [g for g in given if isinstance(g, torch.Generator)]
        self.device = device
        self.before = self._states()

    def _states(self) -> list[Tensor]:
        states = [generator.get_state() for generator in self.generators]
        if states:  # the step draws from these, and other threads may from torch's
            return states
        states.append(torch.get_rng_state())
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def check(self) -> None:
        """Compares.

        Raises:
            ValueError: A state has moved.
        """
        if not all(map(torch.equal, self.before, self._states())):
            raise ValueError(
                f"{self.name}.step drew noise (eta or churn above 0?), which hides how fast the "
                "picture changes; make it deterministic, or call disable first"
            )
