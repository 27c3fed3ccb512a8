"""What a plan's model predicts, for every solver of ours and for diffusers' schedulers."""

import math

import diffusers
import numpy as np
import pytest

from sidestep.runtime.plan import Plan
from sidestep.runtime.plan_course import infer_prediction, plan_course, rising
from sidestep.runtime.schedules import DiscreteVP, FlowMatching
from sidestep.runtime.solvers import SOLVERS

SD = DiscreteVP.scaled_linear()
ODE = [name for name, solver in SOLVERS.items() if not solver.stochastic]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("solver", ODE)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_solver_of_ours(solver: str, prediction: str) -> None:
    assert infer_prediction(SOLVERS[solver].plan(SD, "karras", 12, prediction)) == prediction


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++2m", "unipc2", "dpmsolver++3s"])
def test_flows(solver: str) -> None:
    plan = SOLVERS[solver].plan(FlowMatching(), "trailing", 12, "flow_prediction")
    assert infer_prediction(plan) == "flow_prediction"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"]
)
def test_schedulers_of_diffusers(name: str, prediction: str) -> None:
    settings = {"clip_sample": False} if name == "DDIM" else {}
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        **BETAS, prediction_type=prediction, **settings
    )
    assert infer_prediction(Plan.from_scheduler(scheduler, 12)) == prediction


def test_the_flow_scheduler_of_diffusers() -> None:
    plan = Plan.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 12)
    assert infer_prediction(plan) == "flow_prediction"


def test_unknown_where_it_cannot_be_told() -> None:
    sde = SOLVERS["sde-dpmsolver++2m"].plan(SD, "karras", 6)
    assert sde.stochastic and infer_prediction(sde) is None
    assert infer_prediction(SOLVERS["ddim"].plan(SD, "karras", 6)[:1]) is None
    assert infer_prediction(Plan.from_scheduler(diffusers.IPNDMScheduler(), 4)) is None


def test_course() -> None:
    plan = SOLVERS["dpmsolver++2m"].plan(SD, "karras", 6, "v_prediction")
    course = plan_course(plan, rows=3)
    assert (course.rows, course.steps, course.prediction, course.multistep) == (
        3, 6, "v_prediction", True,
    )  # fmt: skip
    assert course.log_snr == tuple(plan.log_snr)
    assert not plan_course(SOLVERS["ddim"].plan(SD, "karras", 6)).multistep


def test_lambda_that_falls_is_not_told() -> None:
    assert rising(None) is None and rising(np.array([1.0, 0.0, 2.0])) is None
    for levels in ([-math.inf, 0.0, 0.0, math.inf], [0.5], []):
        assert rising(np.array(levels)) == tuple(levels)
