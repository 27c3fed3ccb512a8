"""What a captured call of a module goes by: every change of it is seen, and what forbids it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sidestep.runtime.graphs_model import difference, obstacle, settings, state_of


class Processor:
    """As an attention processor: a plain object with settings."""

    def __init__(self) -> None:
        self.scale: Any = [1.0, 0.5]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.processor, self.flags = Processor(), {"sliced": False, "nan": float("nan")}


def replace_weight(model: Network) -> None:
    model.inner[0].weight = nn.Parameter(model.inner[0].weight.detach().clone())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: m.processor.scale.__setitem__(1, 0.6), "processor"),
        (lambda m: setattr(m, "processor", Processor()), "processor"),
        (lambda m: m.flags.update(sliced=True), "flags"),
        (lambda m: setattr(m, "more", None), "more"),
        (lambda m: delattr(m, "flags"), "flags"),
        (lambda m: setattr(m.inner[2], "p", 0.4), "inner.2.p"),
        (lambda m: m.inner[0].eval(), "inner.0.training"),
        (replace_weight, "inner.0._parameters"),
        (lambda m: m.double(), "inner.0._parameters"),
        (lambda m: m.inner[1].register_buffer("running_mean", torch.ones(3)), "inner.1._buffers"),
        (lambda m: m.inner.__setitem__(2, nn.Identity()), "inner.2 (class)"),
        (lambda m: m.inner.append(nn.ReLU()), "inner.3.training"),
        (lambda m: setattr(m.inner[2], "__class__", nn.Dropout1d), "inner.2 (class)"),
    ],
)
def test_every_change_is_seen(change: Any, name: str) -> None:
    model = Network()
    before = state_of(model)
    held = list(model.parameters())  # so that what is freed does not come back at its place
    assert difference(before, state_of(model)) is None
    change(model)
    assert difference(before, state_of(model)) == name
    assert len(held) == 4


def test_what_a_replay_sees_by_itself_is_no_change() -> None:
    model = Network()
    before = state_of(model)
    with torch.no_grad():
        model.inner[0].weight.mul_(2)
    model.inner[0].weight.requires_grad_(False)
    model.eval().train()
    assert difference(before, state_of(model)) is None
    assert difference(before, state_of(copy.deepcopy(model))) is not None  # elsewhere


def test_settings_of_torch() -> None:
    before = settings()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert difference(before, settings()) == "torch.backends.cuda's attention"
    assert difference(before, settings()) is None


def test_obstacles() -> None:
    model = Network()
    assert obstacle(model) is None
    assert obstacle(print) == (
        "builtin_function_or_method is no torch.nn.Module, and what it reads is not known"
    )
    handle = model.inner[1].register_forward_hook(lambda *given: None)
    assert obstacle(model) == "Network.inner.1 has forward hooks, which run on the host"
    handle.remove()
    assert obstacle(model) is None
    model.inner[0].forward = lambda x: x  # type: ignore[method-assign]
    assert obstacle(model) == (
        "the forward method of Network.inner.0 was exchanged, and what it keeps is not known"
    )


def test_hooks_of_diffusers() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    model = Network()
    registry = HookRegistry.check_if_exists_or_initialize(model)
    assert obstacle(model) is None  # empty, as cache_context makes it
    registry.register_hook(ModelHook(), "one")
    assert obstacle(model) is not None
