"""Every pipeline of the table: nothing changes unless something is skipped, and it really is."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_cases import CASES, Case, run
from tiny_methods import NEVER, ByRow, Pattern, marks
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sidestep.adapters.enable import enable
from sidestep.runtime.methods.adaptive import Adaptive

STEPS = 7
MARKS = "##..#.#"
PROMPTS = [1, 2]
UNGUIDED = ["StableDiffusion", "Flux", "DiT", "TextToVideoSD", "Wan", "ControlNet", "IP-Adapter"]

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecated pipelines say so


@contextmanager
def counted_rows(case: Case, pipe: Any) -> Iterator[list[int]]:
    """Rows of every call that reaches the networks, below all that is attached to them."""
    rows: list[int] = []

    def count(_module: Any, args: Any) -> None:
        rows.append(len(args[0]) // case.probed)

    probes = [getattr(pipe, name).get_submodule(case.probe) for name in case.networks]
    hooks = [probe.register_forward_pre_hook(count) for probe in probes]
    yield rows
    for hook in hooks:
        hook.remove()


@contextmanager
def by_hand(case: Case, pipe: Any, pattern: str) -> Iterator[list[str]]:
    """The method in the simplest way: whole batches, outputs kept by their place in the step.

    Yields the marks of the steps as they went: a network without an output computes one.
    """
    went: list[str] = []
    kept: dict[tuple[str, int], Any] = {}
    take_step = pipe.scheduler.step
    place = 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal place
        place = 0
        return take_step(*args, **kwargs)

    def stand_in(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal place
        if place == 0:
            went.append(pattern[len(went)] if (name, 0) in kept else "#")
        if went[-1] == "#":
            kept[name, place] = forward(*args, **kwargs)
        place += 1
        return tree_map_only(Tensor, torch.clone, kept[name, place - 1])

    models = [getattr(pipe, name) for name in case.networks]
    for name, model in zip(case.networks, models, strict=True):
        model.forward = functools.partial(stand_in, name, model.forward)
    pipe.scheduler.step = step
    yield went
    del pipe.scheduler.step
    for model in models:
        del model.forward


@functools.cache
def built(name: str) -> Any:
    """One pipeline for all tests: `disable` leaves it as it was."""
    return CASES[name].build()


@pytest.mark.parametrize("name", CASES)
def test_without_skips_it_is_the_plain_run_bit_for_bit(name: str) -> None:
    case, pipe = CASES[name], built(name)
    plain = run(case, pipe, PROMPTS, STEPS)
    assert plain.isfinite().all()
    with enable(pipe, NEVER) as handle:
        assert torch.equal(run(case, pipe, PROMPTS, STEPS), plain)
    assert handle.summary().nfe == (handle.summary().steps,) * len(PROMPTS)


@pytest.mark.parametrize(
    "name, guided",
    [
        *[pytest.param(name, True, id=name) for name in CASES],
        *[pytest.param(name, False, id=f"{name}, no guidance") for name in UNGUIDED],
    ],
)
def test_skipped_steps_hold_the_last_output(name: str, guided: bool) -> None:
    case, pipe = CASES[name], built(name)
    with by_hand(case, pipe, MARKS) as went:
        expected = run(case, pipe, PROMPTS, STEPS, guided)
    with enable(pipe, Pattern(MARKS)) as handle, counted_rows(case, pipe) as rows:
        ours = run(case, pipe, PROMPTS, STEPS, guided)
    assert torch.equal(ours, expected) and ours.isfinite().all()
    assert marks(handle) == ["".join(went)] * 2, handle.summary().reasons
    calls = case.calls if guided else 1
    branches = case.guided // calls if guided else 1
    assert rows == [branches * 2] * (went.count("#") * calls)
    assert len(rows) == handle.summary().ticks


@pytest.mark.parametrize("name", CASES)
def test_batched_equals_each_prompt_alone(name: str) -> None:
    case, pipe = CASES[name], built(name)
    prompts = [3, 1, 2]
    with enable(pipe, ByRow()) as handle:
        with counted_rows(case, pipe) as rows:
            together, shown = run(case, pipe, prompts, STEPS), marks(handle)
        assert len(set(shown)) > 1 and any("." in row for row in shown)
        assert sum(rows) == case.guided * sum(handle.summary().nfe)
        alone = run(case, pipe, prompts[1:2], STEPS)
        assert marks(handle) == [shown[1]]
    scale = float(alone.abs().max())
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", CASES)
def test_the_default_method_decides_for_each_prompt_by_itself(name: str) -> None:
    case, pipe = CASES[name], built(name)
    with enable(pipe, Adaptive()) as handle:
        together, shown = run(case, pipe, PROMPTS, 20), marks(handle)
        assert all("." in row for row in shown), handle.summary()
        again = run(case, pipe, PROMPTS, 20)
        assert torch.equal(again, together) and marks(handle) == shown
        for row, prompt in enumerate(PROMPTS):
            alone = run(case, pipe, [prompt], 20)
            assert marks(handle) == [shown[row]]
            scale = float(alone.abs().max())
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-4 * scale)
