"""Pipelines that cannot be captured run as without graphs, and the summary says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from graph_recorder import Recorder
from tiny_graphs import Elementwise, counts, elementwise, graphed
from tiny_pipelines import generate
from torch import Tensor

from sidestep import SRDS, Adaptive, Ranks, enable
from sidestep.kernels import config
from sidestep.runtime.graphs import CaptureError

EXACT = SRDS(exact=True, blocks=3)


class Looking(Elementwise):
    """Asks the device for a number."""

    def formula(self, sample: Tensor, timestep: Any, text: Tensor) -> Tensor:
        return super().formula(sample, timestep, text) * float(sample.abs().sum().item() >= 0)


class Counting(Elementwise):
    """Goes by how often it was called."""

    calls = 0

    def formula(self, sample: Tensor, timestep: Any, text: Tensor) -> Tensor:
        self.calls += 1
        return super().formula(sample, timestep, text) * (1 if self.calls < 5 else 1.001)


class Large(Elementwise):
    """Has memory for so many lines."""

    most = 1000
    error: BaseException = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\n+")

    def formula(self, sample: Tensor, timestep: Any, text: Tensor) -> Tensor:
        if len(sample) > self.most:
            raise self.error
        return super().formula(sample, timestep, text)


def test_arguments_of_enable() -> None:
    pipe = elementwise()
    with pytest.raises(ValueError, match="graphs is 'maybe', expected 'auto', 'on' or 'off'"):
        enable(pipe, SRDS(), graphs="maybe")
    with pytest.raises(ValueError, match="graphs='off' belongs to driver='whole'"):
        enable(pipe, Adaptive(), graphs="off")
    with (
        enable(pipe, SRDS(), graphs="on"),
        pytest.raises(ValueError, match="graphs='on' with a model on cpu, expected one on a CUDA"),
    ):
        generate(pipe, [1], steps=6)
    with enable(pipe, SRDS()) as handle:
        generate(pipe, [1], steps=6)
        assert handle.summary().graphs == ""  # nothing to say on a CPU
        assert "CUDA" not in str(handle.summary())
    with enable(pipe, SRDS(), graphs="off") as handle:
        recorder = graphed(handle)
        generate(pipe, [1], steps=6)
        assert handle.summary().graphs == "" and not recorder.warmed


def test_a_capture_that_fails_falls_back() -> None:
    made = []
    for recorded in (False, True):
        pipe = elementwise(Looking)
        with enable(pipe, EXACT) as handle:
            recorder = graphed(handle) if recorded else None
            made.append([generate(pipe, [p], steps=8) for p in (1, 2)])
            summary = handle.summary()
    assert all(map(torch.equal, *made))
    assert recorder is not None and not recorder.captured
    assert summary.graphs == (
        "none: capturing a tick in a CUDA graph failed at the model call: operation not permitted "
        "when stream is capturing"
    )
    assert f"CUDA graphs: {summary.graphs}" in str(summary)
    assert len(recorder.warmed) == 3  # a failure is not tried again with the same pipeline


def test_on_raises_in_its_place() -> None:
    pipe = elementwise(Looking)
    with enable(pipe, EXACT, graphs="on") as handle:
        graphed(handle)
        for _ in range(2):
            with pytest.raises(CaptureError, match="graphs='on' and there are none: capturing a"):
                generate(pipe, [1], steps=8)
        pipe.unet.__class__ = Elementwise
    with enable(pipe, EXACT, graphs="on") as handle:
        graphed(handle)
        generate(pipe, [1], steps=8)
        assert counts(handle)[0] > 0


def test_a_model_that_keeps_state_from_call_to_call() -> None:
    made = []
    for recorded in (False, True):
        pipe = elementwise(Counting)
        with enable(pipe, EXACT) as handle:
            recorder = graphed(handle) if recorded else None
            made.append(generate(pipe, [1], steps=8))
            summary = handle.summary()
    assert torch.equal(*made)
    assert recorder is not None and not recorder.captured
    assert "Counting.calls changes as the model is called" in summary.graphs


def test_what_is_changed_between_two_pictures() -> None:
    pipe, other = elementwise(), elementwise()
    with enable(pipe, EXACT) as handle, enable(other, EXACT):
        graphed(handle)

        def same() -> tuple[Tensor, int]:
            results = [generate(one, [1], steps=8) for one in (pipe, other)]
            assert torch.equal(*results)
            return results[0], counts(handle)[0]

        first, _ = same()
        _, captured = same()
        assert captured > 0
        with torch.no_grad():
            for one in (pipe, other):
                one.unet.conv_in.bias[0] += 0.5  # in place: the graphs read it there
        second, captured = same()
        assert captured <= 1 and not torch.equal(first, second)
        for one in (pipe, other):
            one.unet.gain = 0.7  # a setting: they have gone by it
        third, captured = same()
        assert captured > 1 and not torch.equal(second, third)
        for one in (pipe, other):
            one.unet.conv_in.bias = torch.nn.Parameter(one.unet.conv_in.bias.detach() * 2)
        fourth, captured = same()
        assert captured > 1 and not torch.equal(third, fourth)


def test_hooks_run_at_every_call() -> None:
    pipe, calls = elementwise(), []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(1))
    with enable(pipe, EXACT) as handle:
        recorder = graphed(handle)
        generate(pipe, [1], steps=8)
        assert handle.summary().graphs == (
            "none: Elementwise has forward hooks, which run on the host"
        )
        assert len(calls) == handle.summary().ticks and not recorder.warmed
        hook.remove()
        generate(pipe, [1], steps=8)
        assert counts(handle)[0] > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda pipe: pipe.unet.compile(backend="eager"), "the model is compiled"),
        (
            lambda pipe: setattr(pipe.unet.conv_in, "forward", pipe.unet.conv_in.forward),
            "the forward method of Elementwise.conv_in was exchanged",
        ),
        (
            lambda pipe: setattr(pipe.unet.mid_block, "_hf_hook", object()),
            "Elementwise.mid_block has a hook of accelerate",
        ),
    ],
)
def test_what_a_replay_would_leave_out(change: Any, reason: str) -> None:
    pipe = elementwise()
    with enable(pipe, EXACT):
        expected = generate(pipe, [1], steps=8)
    change(pipe)
    with enable(pipe, EXACT) as handle:
        recorder = graphed(handle)
        assert torch.equal(generate(pipe, [1], steps=8), expected)
        assert handle.summary().graphs.startswith(f"none: {reason}")
        assert not recorder.warmed


def test_an_argument_that_may_change_unseen() -> None:
    pipe = elementwise()
    scales = np.ones(3)
    with enable(pipe, EXACT) as handle:
        recorder = graphed(handle)
        generate(pipe, [1], steps=8, cross_attention_kwargs={"scales": scales})
        assert handle.summary().graphs == (
            "none: an argument of the model holds a ndarray, which a replay does not read"
        )
        generate(pipe, [1], steps=8, cross_attention_kwargs={"scales": [1.0, 1.0]})
        captured = len(recorder.captured)
        generate(pipe, [1], steps=8, cross_attention_kwargs={"scales": [1.0, 0.5]})
        assert len(recorder.captured) > captured > 0  # numbers are of the key


def test_the_reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "backend", lambda: "reference")
    pipe = elementwise()
    with enable(pipe, EXACT) as handle:
        graphed(handle)
        generate(pipe, [1], steps=8)
        assert handle.summary().graphs.startswith("none: the reference backend")


@pytest.mark.parametrize("stage", ["warm_up", "capture"])
def test_memory_that_suffices_only_without_graphs(stage: str) -> None:
    class Cramped(Recorder):
        """A pool that has no room for more than four lines."""

        def warm_up(self, call: Any) -> None:
            with_less(super().warm_up, call, always=stage == "warm_up" or self.failed)

        def capture(self, call: Any) -> Any:
            self.failed = True
            return with_less(super().capture, call, always=True)

        failed = False

    def with_less(do: Any, call: Any, always: bool) -> Any:
        Large.most = 4 if always else 1000
        try:
            return do(call)
        finally:
            Large.most = 1000

    pipe = elementwise(Large)
    with enable(pipe, EXACT):
        expected = generate(pipe, [1], steps=8)
    with enable(pipe, EXACT) as handle:
        graphed(handle, Cramped())
        assert torch.equal(generate(pipe, [1], steps=8), expected)
        said = handle.summary().graphs
        assert said.endswith("none: out of memory: CUDA out of memory. Tried to allocate 2 GiB")
        assert len(handle._driver.graphs._graphs) == 0
        assert torch.equal(generate(pipe, [1], steps=8), expected)


@pytest.mark.parametrize("stage", ["warm_up", "capture"])
def test_memory_that_was_short_is_asked_for_again(stage: str) -> None:
    """After 1 generation without graphs, then 2, then 4; other failures are remembered for ever."""

    class Short(Recorder):
        tries, short = 0, True
        error: Exception = torch.OutOfMemoryError("CUDA out of memory.")

        def _try(self, do: Any, call: Any) -> Any:
            if self.short:
                self.tries += 1
                raise self.error
            return do(call)

        def warm_up(self, call: Any) -> None:
            self._try(super().warm_up, call) if stage == "warm_up" else super().warm_up(call)

        def capture(self, call: Any) -> Any:
            return self._try(super().capture, call)

    pipe, short = elementwise(), Short()
    with enable(pipe, EXACT):
        expected = generate(pipe, [1], steps=8)

    def tried() -> bool:
        before = short.tries
        assert torch.equal(generate(pipe, [1], steps=8), expected)
        assert "CUDA out of memory" in handle.summary().graphs
        return short.tries > before

    with enable(pipe, EXACT) as handle:
        graphed(handle, short)
        assert [tried() for _ in range(8)] == [True, False, True, False, False, True, False, False]
        short.short = False
        assert not tried() and not tried()
        assert torch.equal(generate(pipe, [1], steps=8), expected)
        assert counts(handle)[0] > 0 and "none" not in handle.summary().graphs
    if stage == "capture":
        short.short, short.error = True, RuntimeError("no such luck: CUDA out of memory")
        with enable(pipe, EXACT) as handle:
            graphed(handle, short)
            assert [tried() for _ in range(4)] == [True, False, False, False]


def test_a_model_that_breaks_down_in_the_middle() -> None:
    pipe = elementwise(Large)
    with enable(pipe, EXACT) as handle:
        graphed(handle)
        expected = generate(pipe, [1], steps=8)
        pipe.unet.error, pipe.unet.most = RuntimeError("the model broke down"), 2
        with pytest.raises(RuntimeError, match="the model broke down"):
            generate(pipe, [1], steps=8)
        pipe.unet.error, pipe.unet.most = KeyboardInterrupt(), 2
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, [1], steps=8)
        del pipe.unet.error, pipe.unet.most
        assert torch.equal(generate(pipe, [1], steps=8), expected)


def test_ranks_launch() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        with Ranks() as ranks, enable(elementwise(), EXACT, ranks=ranks) as handle:
            recorder = graphed(handle)
            generate(handle._pipe, [1], steps=8)
            assert handle.summary().graphs == "none: ranks launch what they run"
            assert not recorder.warmed
    finally:
        torch.distributed.destroy_process_group()
