"""What the criterion is told about the steps to come: how many, and where they lie."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sidestep.adapters.attach_course import course_of
from sidestep.adapters.scheduler import SidestepScheduler
from sidestep.runtime.methods.criterion import Course
from sidestep.runtime.plan import Plan
from sidestep.runtime.plan_course import plan_course

KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "euler karras": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}),
    "edm": (diffusers.EDMEulerScheduler, {}),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_steps_lie(kind: str) -> None:
    make, settings = KINDS[kind]
    plan = Plan.from_scheduler(make(**settings), 6)
    scheduler: Any = make(**settings)
    for first, sets_begin in ((0, True), (0, False), (4, True), (4, False)):
        scheduler.set_timesteps(6)
        if sets_begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        before = {name: repr(value) for name, value in vars(scheduler).items()}
        course = course_of(scheduler, scheduler.timesteps[first])
        steps, log_snr = course.steps, course.log_snr
        assert {name: repr(value) for name, value in vars(scheduler).items()} == before
        assert steps == 6 - first and log_snr is not None and plan.log_snr is not None
        np.testing.assert_allclose(log_snr, plan.log_snr[first:], rtol=1e-4)
        assert (np.diff(log_snr) > 0).all() and course.rows == 0
        assert course.multistep == (plan.registers > 1)


EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in (
            "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EDMDPMSolverMultistep",
            "EDMEuler", "EulerDiscrete", "FlowMatchEulerDiscrete", "LMSDiscrete", "UniPCMultistep",
        )
    },
    "DDIM": ("DDIM", {"clip_sample": False}),
    "DDIM, v": ("DDIM", {"clip_sample": False, "prediction_type": "v_prediction"}),
    "PNDM": ("PNDM", {"skip_prk_steps": True}),
    "EDMEuler, v": ("EDMEuler", {"prediction_type": "v_prediction"}),
    "EDMEuler, other data": ("EDMEuler", {"sigma_data": 1.0}),
    "EDM-DPM 1": ("EDMDPMSolverMultistep", {"solver_order": 1}),
    "DPM 1": ("DPMSolverMultistep", {"solver_order": 1}),
    "UniPC 1": ("UniPCMultistep", {"solver_order": 1}),
    "UniPC 1, in part": ("UniPCMultistep", {"solver_order": 1, "disable_corrector": [0, 1, 2]}),
    "UniPC 1, alone": ("UniPCMultistep", {"solver_order": 1, "disable_corrector": [*range(11)]}),
    "flow by UniPC": (
        "UniPCMultistep",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", EQUAL)
def test_a_scheduler_and_its_plan_say_the_same(kind: str) -> None:
    """The engine decides by what the plan shows as the stepwise driver by the scheduler."""
    name, settings = EQUAL[kind]
    make = getattr(diffusers, f"{name}Scheduler")
    scheduler = make(**settings)
    scheduler.set_timesteps(12)
    told = course_of(scheduler, scheduler.timesteps[0])
    shown = plan_course(Plan.from_scheduler(make(**settings), 12))
    assert (told.steps, told.prediction, told.multistep) == (
        shown.steps, shown.prediction, shown.multistep,
    )  # fmt: skip
    assert told.log_snr is not None and shown.log_snr is not None
    np.testing.assert_allclose(told.log_snr, shown.log_snr, atol=1e-4)
    several = {"UniPC 1", "UniPC 1, in part", "EDMDPMSolverMultistep", "DPMSolverMultistep"}
    single = {"UniPC 1, alone", "EDM-DPM 1", "DPM 1", "EDMEuler", "DDIM"}
    assert told.multistep is (kind in several) or kind not in several | single
    if kind.startswith("EDM"):
        assert told.prediction == (None if kind.endswith("other data") else "edm")


class Elsewhere(torch.Tensor):
    """A tensor on an accelerator, which numpy refuses to read."""

    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("kind, table", [("flow", "sigmas"), ("ddim", "alphas_cumprod")])
def test_tables_that_are_kept_where_the_latents_are(kind: str, table: str) -> None:
    """Flow matching's `set_timesteps(device=...)`, and DDIM after `add_noise`, leave them there."""
    make, settings = KINDS[kind]
    scheduler: Any = make(**settings)
    scheduler.set_timesteps(6)
    expected = course_of(scheduler, scheduler.timesteps[0])
    setattr(scheduler, table, getattr(scheduler, table).as_subclass(Elsewhere))
    with pytest.raises(TypeError, match="cuda"):
        np.array(getattr(scheduler, table)[:3])
    assert course_of(scheduler, scheduler.timesteps[0]) == expected
    assert expected.log_snr is not None


def test_our_own_scheduler() -> None:
    scheduler = SidestepScheduler(beta_schedule="scaled_linear")
    assert scheduler.log_snr is None
    scheduler.set_timesteps(8)
    course = course_of(scheduler, scheduler.timesteps[2])
    steps, log_snr = course.steps, course.log_snr
    assert steps == 6 and course.multistep and log_snr is not None and (np.diff(log_snr) > 0).all()
    assert log_snr == tuple(scheduler.log_snr[2:].tolist())


def test_repeated_timesteps_begin_at_the_first() -> None:
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(9)
    course = course_of(scheduler, scheduler.timesteps[1])
    steps, log_snr = course.steps, course.log_snr
    assert course.multistep
    assert steps == 9 and log_snr is not None and log_snr[0] == log_snr[1]


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep"])
def test_an_inversion_has_no_lambda(name: str) -> None:
    """It falls there, and a criterion that counts on its rise would skip whatever it sees."""
    scheduler = getattr(diffusers, f"{name}InverseScheduler")()
    scheduler.set_timesteps(6)
    course = course_of(scheduler, scheduler.timesteps[0])
    assert course.steps == 6 and course.log_snr is None


def test_what_is_not_known_is_none() -> None:
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    assert course_of(scheduler, 12345) == Course(prediction="epsilon")
    assert course_of(object(), 1) == Course()  # type: ignore[arg-type]


def test_what_the_model_predicts() -> None:
    made: dict[str | None, Any] = {
        "v_prediction": diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
        "flow_prediction": diffusers.FlowMatchEulerDiscreteScheduler(),
        "edm": diffusers.EDMEulerScheduler(),
        None: diffusers.EDMEulerScheduler(sigma_data=1.0),
    }
    for expected, scheduler in made.items():
        scheduler.set_timesteps(4)
        assert course_of(scheduler, scheduler.timesteps[0]).prediction == expected
    flow = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    flow.set_timesteps(4)
    assert course_of(flow, flow.timesteps[0]).prediction == "flow_prediction"


def test_a_pipeline_may_end_early() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    course = course_of(scheduler, scheduler.timesteps[2], announced=5)
    steps, log_snr = course.steps, course.log_snr
    assert steps == 5 and log_snr is not None and len(log_snr) == 5
    assert course_of(scheduler, scheduler.timesteps[2], announced=99).steps == 8
