"""``enable(pipe, "auto")``: what is decided, from what, and what the summary says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_trajectory import assert_same
from tiny_pipelines import generate, tiny_sd

from sidestep import SRDS, Ranks, enable
from sidestep.adapters import trajectory_auto
from sidestep.planning import Measured
from sidestep.runtime.latency import Latency, Overhead

STEPS = 16


def pretend(monkeypatch: pytest.MonkeyPatch, *, a: float, largest: float = 64.0) -> list[Any]:
    """A device with t(b) = 10 ms (a + (1 - a) b); what was measured on it."""
    seen = []

    def measure(trajectory: Any, **_: Any) -> Measured:
        seen.append(trajectory)
        points = tuple((b, 0.01 * (a + (1 - a) * b)) for b in (0.5, 1.0, 2.0, largest))
        return Measured(
            latency=Latency(points), overhead=Overhead(), images=len(trajectory.start),
            branches=2, trajectory=trajectory,
        )  # fmt: skip

    monkeypatch.setattr(trajectory_auto, "measure_recorded", measure)
    return seen


def test_what_is_measured_decides_and_the_picture_is_the_plain_one() -> None:
    pipe = tiny_sd()
    plain = generate(pipe, [1, 2], steps=STEPS)
    state = torch.get_rng_state()
    with enable(pipe, "auto") as handle:
        found = generate(pipe, [1, 2], steps=STEPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found - plain).square().mean().sqrt() < SRDS().tolerance
    assert handle.summary().note.startswith(("auto: serial: ", "auto: srds in "))
    assert handle.method == "auto"
    assert_same(generate(pipe, [1, 2], steps=STEPS), plain)


def test_every_call_is_made_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    plain = generate(pipe, [1, 2], steps=STEPS)
    pretend(monkeypatch, a=0)
    with enable(pipe, "auto") as handle:
        assert_same(generate(pipe, [1, 2], steps=STEPS), plain)
    summary = handle.summary()
    assert summary.iterations == () and summary.ticks == STEPS
    assert "auto: serial: a call with" in str(summary)


def test_srds_runs_where_calls_of_any_size_take_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    seen = pretend(monkeypatch, a=1)
    with enable(pipe, "auto") as handle:
        generate(pipe, [1, 2], steps=STEPS)
        first = handle.summary()
        generate(pipe, [3, 4], steps=STEPS + 2)
        assert len(seen) == 1  # of this shape
        generate(pipe, [3], steps=STEPS)
        assert len(seen) == 2
    assert len(first.iterations) == 2 and "calls in a row instead of 16" in first.note
    assert f"auto: srds in {len(SRDS().bounds(STEPS)) - 1} blocks: " in first.note


def test_no_call_is_larger_than_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    pretend(monkeypatch, a=1, largest=14)
    sizes: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with enable(pipe, "auto") as handle:
        generate(pipe, [1, 2], steps=50)
    assert "auto: srds" in handle.summary().note
    assert max(sizes) <= 14 * 2  # evaluations, branches


def test_too_few_steps_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_sd()
    seen = pretend(monkeypatch, a=1)
    with enable(pipe, "auto") as handle:
        generate(pipe, [1], steps=3)
    assert not seen and "3 steps are too few" in handle.summary().note


def test_what_does_not_go_with_it_is_refused() -> None:
    ranks = Ranks.__new__(Ranks)  # a process group is not needed for a refusal
    ranks.size, ranks.team = 2, 1
    with pytest.raises(ValueError, match="ranks share the blocks of SRDS"):
        enable(tiny_sd(), "auto", ranks=ranks)
    with pytest.raises(ValueError, match="expected driver='whole'"):
        enable(tiny_sd(), "auto", driver="stepwise")
    with pytest.raises(TypeError, match="method is 'srds', expected settings"):
        enable(tiny_sd(), "srds")  # type: ignore[arg-type]
