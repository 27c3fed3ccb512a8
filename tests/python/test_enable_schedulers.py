"""Every scheduler of diffusers under `enable`: it works, or is refused with the reason."""

import inspect
from typing import Any

import diffusers
import pytest
import torch
from tiny_methods import NEVER, Pattern, marks
from tiny_pipelines import BETAS, generate, tiny_sd

from sidestep.adapters.enable import enable
from sidestep.adapters.refusals import refuse_unsuitable
from sidestep.runtime.methods.adaptive import Adaptive

TWICE = "calls the model twice a step"
NOISE = "adds noise at every step"
TOKENS = "steps whole tokens"

FINE = {
    name: {}
    for name in (
        "DDIM", "DDIMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep",
        "EDMDPMSolverMultistep", "EDMEuler", "EulerDiscrete", "IPNDM", "LMSDiscrete",
        "UniPCMultistep",
    )
}  # fmt: skip
FINE["PNDM"] = {"skip_prk_steps": True}
"""In a Stable Diffusion loop, whatever comes out of it."""

OTHER_LOOPS = {
    "CogVideoXDDIM", "DDIMInverse", "DPMSolverMultistepInverse", "FlowMapEulerDiscrete",
    "FlowMatchEulerDiscrete", "Helios", "MiniMaxH3", "Piflow",
}  # fmt: skip
"""Not refused; their `step` wants arguments that Stable Diffusion does not give, or goes back."""

REFUSED = {
    **dict.fromkeys(["DPMSolverSDE", "FlowMatchHeunDiscrete", "HeunDiscrete", "KDPM2Discrete",
                     "KDPM2AncestralDiscrete"], TWICE),
    **dict.fromkeys(["CMStochasticIterative", "CogVideoXDPM", "CosineDPMSolverMultistep", "DDPM",
                     "DDPMParallel", "DDPMWuerstchen", "EulerAncestralDiscrete", "FlowMatchLCM",
                     "HeliosDMD", "LCM", "LTXEulerAncestralRF", "RePaint", "RFD4Proteina",
                     "SASolver", "SCM", "TCD", "UnCLIP"], NOISE),
    **dict.fromkeys(["Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound", "VQDiffusion"],
                    TOKENS),
    **dict.fromkeys(["KarrasVe", "ScoreSdeVe"], "has no `step` with an argument `sample`"),
}  # fmt: skip


def made(name: str, **settings: Any) -> Any:
    """A scheduler whose class alone is looked at, where its arguments would need data."""
    kind = getattr(diffusers, f"{name}Scheduler")
    required = [
        p.name
        for p in inspect.signature(kind.__init__).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
    ]
    return object.__new__(kind) if required else kind(**settings)


def test_the_tables_have_all_schedulers() -> None:
    exported = {
        name.removesuffix("Scheduler")
        for name in dir(diffusers)
        if name.endswith("Scheduler") and "Flax" not in name
    }
    assert exported == set(FINE) | OTHER_LOOPS | set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^enable: {name}Scheduler.*{REFUSED[name]}"):
        refuse_unsuitable(made(name))


@pytest.mark.parametrize("name", sorted(OTHER_LOOPS))
def test_what_belongs_to_other_pipelines_is_not_refused(name: str) -> None:
    refuse_unsuitable(made(name))


@pytest.mark.parametrize("name", FINE)
def test_what_works(name: str) -> None:
    pipe = tiny_sd()
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler")(**FINE[name])
    steps = 8 - (name == "PNDM")  # its second timestep comes twice
    plain = generate(pipe, [1, 2], steps=steps)
    assert plain.isfinite().all()
    with enable(pipe, NEVER) as handle:
        assert torch.equal(generate(pipe, [1, 2], steps=steps), plain)
        assert handle.summary().steps == 8
    with enable(pipe, Pattern("###.#..#", weights=(2.0, -1.0))) as handle:
        assert generate(pipe, [1, 2], steps=steps).isfinite().all()
        assert marks(handle) == ["###.#..#"] * 2


def test_the_default_method_without_lambda_weighs_all_steps_alike() -> None:
    pipe = tiny_sd()
    pipe.scheduler = diffusers.IPNDMScheduler()
    with enable(pipe) as handle:
        generate(pipe, [1], steps=24)
        assert "." in marks(handle)[0]
    with enable(pipe, Adaptive(threshold=1e-9)) as handle:
        generate(pipe, [1], steps=8)
        note = handle.summary().note
        assert note.startswith("nothing was skipped: of 8 calls") and "by criterion" in note


def test_runge_kutta_steps_are_refused_and_named() -> None:
    pipe = tiny_sd()
    pipe.scheduler = diffusers.PNDMScheduler(**BETAS)
    with pytest.raises(ValueError, match=r"four model calls each.* set skip_prk_steps=True"):
        enable(pipe)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverSinglestep", {"algorithm_type": "sde-dpmsolver++"}),
        ("EDMDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
        ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
    ],
)
def test_settings_that_add_noise_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=NOISE):
        refuse_unsuitable(made(name, **settings))
