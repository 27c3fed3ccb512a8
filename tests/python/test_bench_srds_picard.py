"""ParaDiGMS, the baseline of `sidestep bench srds`, against the serial sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sidestep.adapters.catalogue import make_scheduler
from sidestep.bench.srds_picard import ParaDiGMS, noise_variances, picard, slide
from sidestep.runtime.plan import Plan


def plan_of(scheduler: str, steps: int) -> Plan:
    import diffusers

    own = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return Plan.from_scheduler(make_scheduler(scheduler, None, own), steps)


def wiggle(x: Tensor, t: Any, _images: Any = None) -> Tensor:
    """A model of every element by itself: the batch size does not change a bit of its result."""
    times = torch.as_tensor(t, dtype=torch.float32).expand(len(x)).view(-1, *[1] * (x.dim() - 1))
    return torch.sin(3 * x) * (1 + times / 1000)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("window", [1, 3, 12, 40])
def test_zero_tolerance_equals_the_serial_sampler(scheduler: str, window: int) -> None:
    plan = plan_of(scheduler, 12)
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)) * plan.initial_scale
    behind = 0

    def advance() -> None:
        nonlocal behind
        behind += 1

    found = picard(ParaDiGMS(window=window, tolerance=0), plan, wiggle, x, advance)
    assert torch.equal(found.x, plan.run(lambda x, t: wiggle(x, t), x))
    assert behind == 12 and max(found.ticks) <= 12
    if window == 1:
        assert found.ticks == found.nfe == [12, 12]
    for n in range(2):  # each image has a window of its own
        alone = picard(ParaDiGMS(window=window, tolerance=0), plan, wiggle, x[n : n + 1])
        assert (alone.ticks, alone.nfe) == ([found.ticks[n]], [found.nfe[n]])
        assert torch.equal(alone.x[0], found.x[n])


def test_a_known_path_takes_two_ticks() -> None:
    plan = plan_of("EulerDiscreteScheduler", 12)  # x' = x + M u, and u does not depend on x

    def clock(x: Tensor, t: Tensor, _images: Any) -> Tensor:
        return torch.cos(t / 100)[:, None].expand_as(x)

    found = picard(ParaDiGMS(window=12, tolerance=1e-3), plan, clock, torch.ones(1, 5))
    assert (found.ticks, found.nfe) == ([2], [12 + 11])
    wide = picard(ParaDiGMS(window=12, tolerance=1e6), plan, clock, torch.ones(1, 5))
    assert (wide.ticks, wide.nfe) == ([1], [12])
    torch.testing.assert_close(found.x, wide.x)


def test_a_window_slides_to_the_first_point_that_has_changed() -> None:
    path = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0, 9.0, 9.0])[:, None]
    ends = torch.tensor([1.1, 2.1, 3.5, 4.0])[:, None]  # Phi_0(x_0) .. Phi_3(x_3)
    allowed = torch.tensor([0.0, 0.02, 0.05, 0.1, 0.1, 0.1])
    # 1.1, 2.1 + (1.1 - 1), 3.5 + (2.2 - 2), 4.0 + (3.7 - 3): changes 0.01, 0.04, 0.49
    assert slide(path, ends, 0, allowed) == 3
    expected = [0.0, 1.1, 2.2, 3.7, 4.7, 4.7, 4.7]  # what enters the window is its last point
    assert path[:, 0].tolist() == pytest.approx(expected)


def test_tolerances_are_in_units_of_the_samplers_noise() -> None:
    import diffusers

    ddpm = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    ddpm.set_timesteps(10)
    variances = noise_variances(plan_of("DDIMScheduler", 10))
    published = [float(ddpm._get_variance(int(t))) for t in ddpm.timesteps[:-1]]
    assert variances[:-1] == pytest.approx(published, rel=1e-4)
    assert variances[-1] == variances[-2]
    plan = plan_of("EulerDiscreteScheduler", 10)
    sigma = np.exp(-np.asarray(plan.log_snr))
    up = sigma[1:] ** 2 * (sigma[:-1] ** 2 - sigma[1:] ** 2) / sigma[:-1] ** 2
    assert noise_variances(plan)[:-1] == pytest.approx(up)


def test_what_is_no_sequence_of_maps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ParaDiGMS: .* keeps 2 registers, expected a determin"):
        picard(ParaDiGMS(window=2), plan_of("DPMSolverMultistep", 4), wiggle, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="draws noise"):
        picard(ParaDiGMS(window=2), plan_of("DDPMScheduler", 4), wiggle, torch.zeros(1, 2))
    for wrong in ({"window": 0}, {"window": 2, "tolerance": -1.0}):
        with pytest.raises(ValueError, match=r"expected [01] or more"):
            ParaDiGMS(**wrong)
