"""The compiler of schedulers on toys: what it accepts, what it finds out, what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sidestep.runtime.plan import Plan
from sidestep.runtime.probe_reasons import NotLinearError


class Toy:
    """A scheduler that shares no code with diffusers; the change of state is given."""

    def __init__(self, change: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        self.change = change
        self.state: dict[str, list[Tensor]] = {"kept": []}
        self.calls = 0

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.linspace(1.0, 0.1, num_inference_steps)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor]:
        self.calls += 1
        return (self.change(self, model_output, sample),)


def test_anything_with_the_methods_of_a_scheduler_compiles() -> None:
    def two_step(self: Toy, u: Tensor, x: Tensor) -> Tensor:
        self.state["kept"].append(x)
        older = self.state["kept"][-2] if len(self.state["kept"]) > 1 else x
        return 0.5 * older + 0.25 * u.to(torch.float32)

    plan = Plan.from_scheduler(Toy(two_step), 3)
    assert plan.registers == 2
    np.testing.assert_array_equal(plan.matrices[0], [[0.5, 0, 0.25], [1, 0, 0]])
    np.testing.assert_array_equal(plan.matrices[1], [[0, 0.5, 0.25], [1, 0, 0]])
    np.testing.assert_array_equal(plan.matrices[2, 0], [0, 0.5, 0.25])
    np.testing.assert_array_equal(plan.timesteps, torch.linspace(1.0, 0.1, 3).double())


def test_noise_of_other_threads_is_their_own() -> None:
    """Only the compiling thread's draws are taken from it."""
    seen: list[Tensor] = []

    def step(self: Toy, u: Tensor, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: seen.append(torch.randn(3)))
        thread.start()
        thread.join()
        return x + u + torch.randn(x.shape, dtype=x.dtype)

    plan = Plan.from_scheduler(Toy(step), 2)
    assert plan.draws.tolist() == [1, 1]
    assert all(s.shape == (3,) for s in seen) and len(seen) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda self, u, x: x + u.clamp(-1, 1), "off in float64"),
        (lambda self, u, x: x + 0.5, "off in float64"),
        (lambda self, u, x: x * u, "off in float64"),
        (lambda self, u, x: x + u * (x.dtype == torch.float64), "in float32 (allowed 1e-02)"),
        (lambda self, u, x: x / 0 + u, "a coefficient is not finite"),
        (lambda self, u, x: x + torch.randn(2, 2), "noise of shape [2, 2] drawn"),
        (lambda self, u, x: x[..., :1], "became [1, 4, 1, 1]"),
        (lambda self, u, x: x + u.missing, "fails with AttributeError"),
    ],
)
def test_what_is_not_linear_is_found_out(
    change: Callable[[Any, Tensor, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(NotLinearError, match="Toy cannot be compiled: ") as caught:
        Plan.from_scheduler(Toy(change), 3)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "options", "error", "message"),
    [
        (0, {}, ValueError, "num_inference_steps is 0, expected at least 1"),
        (2.5, {}, ValueError, "num_inference_steps is 2.5, expected at least 1"),
        (5, {"step": {"eat": 1.0}}, ValueError, "step has ['eat'], expected some of ['s_churn'"),
        (5, {"step": {"generator": None}}, ValueError, "step has ['generator']"),
        (5, {"set_timesteps": {"nu": 1.0}}, ValueError, "set_timesteps has ['nu']"),
        (5, {"set_timesteps": {"num_inference_steps": 4}}, ValueError, "['num_inference_steps']"),
        (5, {"begin_index": 5}, ValueError, "begin_index is 5, expected 0 to 4"),
        (5, {"begin_index": -1}, ValueError, "begin_index is -1, expected 0 to 4"),
        (5, {"method": "stride"}, ValueError, "has no stride(), expected method=['step']"),
        (
            5,
            {"set_timesteps": {"sigmas": [9.0, 1.0, 0.0]}},
            ValueError,
            "num_inference_steps is 5 but sigmas has 3 values, expected 5, or one more",
        ),
    ],
)
def test_bad_arguments(
    steps: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        Plan.from_scheduler(diffusers.EulerDiscreteScheduler(), steps, **options)
    assert message in str(caught.value)


def test_a_default_device_elsewhere_does_not_matter() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    expected = Plan.from_scheduler(scheduler, 6)
    with torch.device("meta"):
        assert Plan.from_scheduler(scheduler, 6) == expected


def test_what_is_no_scheduler() -> None:
    with pytest.raises(TypeError, match="int is no scheduler"):
        Plan.from_scheduler(7, 10)


def test_each_step_is_asked_for_three_times() -> None:
    """Once to probe, twice to check: a compiler whose cost grows otherwise shows here."""
    toy = Toy(lambda self, u, x: x + u)
    calls = []
    toy.change = lambda self, u, x: calls.append(1) or x + u  # type: ignore[func-returns-value]
    Plan.from_scheduler(toy, 50)
    assert len(calls) == 150 and toy.calls == 0
