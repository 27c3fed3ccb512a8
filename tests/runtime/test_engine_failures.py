"""What the engine refuses, and what fails: one sentence each, and never somebody else's request."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import SHAPE, conditioning, latents, loop, model, plan_of, requests, run
from torch import Tensor

import sidestep
from sidestep.runtime.engine import Batch, Engine, QueueFull, Request, Result
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criterion import Course, Decision, Observation
from sidestep.runtime.thresholding import DynamicThreshold

PLAN = plan_of("ddim", 6)
GOOD = Request(PLAN, latents(1, 2), conditioning(1, 2, 1))
PAPER = Adaptive(mode="paper", threshold=0.3)


def run_alone(request: Request) -> list[Result]:
    engine = Engine(SHAPE)
    engine.submit(request)
    return list(run(engine).values())


class Listener:
    """A callback that does something at one step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def __call__(self, k: int, x: Tensor, rows: list[int]) -> None:
        if k == self.step:
            self.action()


def boom() -> None:
    raise KeyError("boom")


class Broken:
    """A method whose criterion does something at step 2, and skips afterwards."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def criterion(self) -> Any:
        return Broken(self.action)

    history = 1

    def start(self, course: Course) -> None:
        pass

    def observe(self, seen: Observation) -> Any:
        if seen.step == 2:
            return self.action()
        return Decision(compute=[seen.step < 2], reasons=["told"])


def decide(**changes: Any) -> Any:
    return lambda: Decision(**{"compute": [False], "reasons": ["told"], **changes})


def wrong_noise(k: int, j: int) -> Tensor:
    return torch.zeros(1) if k == 3 else latents(k, 2)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (replace(GOOD, on_step=Listener(2, boom)), KeyError),
        (replace(GOOD, method=Broken(boom)), KeyError),
        (replace(GOOD, method=Broken(decide)), AttributeError),
        (replace(GOOD, method=Broken(decide(compute=[True] * 2))), ValueError),
        (replace(GOOD, method=Broken(decide(compute=[torch.ones(2)]))), RuntimeError),
        (replace(GOOD, method=Broken(decide(reasons=[]))), ValueError),
        (replace(GOOD, method=Broken(decide(weights=[("x",)]))), ValueError),
        (replace(GOOD, method=Broken(decide(offset=torch.zeros(1, 3)))), ValueError),
        (replace(GOOD, method=Broken(decide(value=torch.zeros(2)))), RuntimeError),
        (replace(GOOD, noise=lambda k, j: boom(), plan=plan_of("sde-dpmsolver++2m", 6)), KeyError),
        (replace(GOOD, noise=wrong_noise, plan=plan_of("sde-dpmsolver++2m", 6)), ValueError),
        (replace(GOOD, x=torch.full((2, *SHAPE), torch.nan), method=PAPER), FloatingPointError),
    ],
    ids=[
        "callback",
        "criterion",
        "no decision",
        "compute",
        "compute of two",
        "reasons",
        "weights",
        "offset",
        "value",
        "noise",
        "shape of the noise",
        "not finite",
    ],
)
def test_a_failing_request_ends_alone(bad: Request, error: type[Exception]) -> None:
    engine = Engine(SHAPE, capacity=8, buckets=(8,))
    others = requests(3, methods=(None, PAPER))
    ids = [engine.submit(request) for request in (others[0], bad, *others[1:])]
    results = run(engine)
    assert results[ids[1]].status == "failed" and results[ids[1]].x is None
    assert isinstance(results[ids[1]].error, error)
    for id, request in zip([ids[0], *ids[2:]], others, strict=True):
        alone = Engine(SHAPE, capacity=8, buckets=(8,))
        alone.submit(request)
        (expected,) = run(alone).values()
        assert results[id].status == "done" and torch.equal(results[id].x, expected.x)
    counts = engine.counts()
    assert (counts["failed"], counts["done"], counts["free"]) == (1, 3, 8)


def test_a_decision_in_other_types_is_read() -> None:
    odd = decide(compute=[torch.tensor(1)], reasons=[["told"]])
    (result,) = run_alone(replace(GOOD, method=Broken(odd)))
    assert result.error is None and result.nfe == (4.0, 4.0)
    assert result.summary.reasons[0][3] == "['told']"


def test_a_step_that_is_broken_off_leaves_no_slot_behind() -> None:
    engine = Engine(SHAPE, capacity=4, buckets=(4,))

    def interrupt() -> None:
        raise KeyboardInterrupt

    first = engine.submit(replace(GOOD, on_step=Listener(2, interrupt)))
    second = engine.submit(GOOD)  # in the same batch: whether it took the step is not known
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    ended = {result.id: result for result in engine.results()}
    assert {id: ended[id].status for id in (first, second)} == {first: "failed", second: "failed"}
    assert str(ended[second].error) == "Engine.complete: broken off by KeyboardInterrupt()"
    assert engine.counts()["free"] == 4
    third = engine.submit(GOOD)
    assert torch.equal(run(engine)[third].x, loop(GOOD))


def test_nan_of_one_request_stays_with_it() -> None:
    engine = Engine(SHAPE, capacity=4, buckets=(1, 8))
    poison = replace(GOOD, x=torch.full((2, *SHAPE), torch.nan), method=PAPER, guidance=(1.0,))
    guided = Request(PLAN, latents(3, 2), conditioning(3, 2, 2), guidance=(-1.0, 2.0), method=PAPER)
    engine.submit(poison)
    id = engine.submit(guided)
    alone = Engine(SHAPE)
    alone.submit(guided)
    (expected,) = run(alone).values()
    result = run(engine)[id]
    assert torch.equal(result.x, expected.x)
    assert result.summary.skip_map == expected.summary.skip_map
    assert str(result.summary.criterion) == str(expected.summary.criterion)
    # the slots that held NaN serve the next request
    id = engine.submit(guided)
    assert torch.equal(run(engine)[id].x, expected.x)


def test_a_failed_call_fails_the_requests_in_it() -> None:
    engine = Engine(SHAPE, capacity=3, buckets=(2,))
    first, second, third = [engine.submit(replace(GOOD, x=GOOD.x[:1], tag=i)) for i in range(3)]
    batch, rest = engine.next(), engine.next()
    assert batch is not None and rest is not None and rest.requests[0] == third
    engine.fail(batch, RuntimeError("out of memory"))
    assert [(r.id, r.status, str(r.error)) for r in engine.results()] == [
        (first, "failed", "out of memory"),
        (second, "failed", "out of memory"),
    ]
    engine.complete(rest, model(rest))
    engine.complete(batch, model(batch))  # too late: changes nothing
    assert run(engine)[third].status == "done"


def test_stale_batches_complete_nothing() -> None:
    engine = Engine(SHAPE, capacity=2, buckets=(2,))
    first = engine.submit(GOOD)
    second = engine.submit(replace(GOOD, x=latents(9, 2)))
    old = engine.next()
    assert old is not None
    assert engine.cancel(first) and not engine.cancel(first)
    new = engine.next()
    assert new is not None and new.requests == (second, second)
    engine.complete(old, torch.full_like(old.x, torch.nan))
    engine.complete(new, model(new))
    for _ in range(2):
        engine.complete(new, torch.full_like(new.x, torch.nan))
    results = run(engine)
    assert (results[first].status, results[first].nfe) == ("cancelled", (0.0, 0.0))
    assert torch.equal(results[second].x, loop(replace(GOOD, x=latents(9, 2))))


def test_cancelling_from_inside_and_while_waiting() -> None:
    engine = Engine(SHAPE, capacity=4, buckets=(4,))
    waiting: list[int] = []
    own = replace(GOOD, on_step=Listener(1, lambda: engine.cancel(0)))
    other = replace(GOOD, on_step=Listener(3, lambda: [engine.cancel(id) for id in (2, 3)]))
    for request in (own, GOOD, other, GOOD):
        waiting.append(engine.submit(request))
    results = run(engine)
    assert [results[id].status for id in waiting] == ["cancelled", "done", "cancelled", "cancelled"]
    assert [results[id].nfe[0] for id in waiting] == [2.0, 6.0, 4.0, 0.0]  # the last was waiting
    assert engine.counts()["free"] == 4
    with pytest.raises(ValueError, match="request 4 is unknown, expected 0 to 3"):
        engine.cancel(4)


def test_a_full_queue_says_so() -> None:
    engine = Engine(SHAPE, capacity=2, queue=2)
    ids = [engine.submit(GOOD) for _ in range(2)]
    with pytest.raises(QueueFull, match="the queue is full, 2 requests wait; submit again when"):
        engine.submit(GOOD)
    assert engine.next() is not None  # the first has slots now
    ids.append(engine.submit(GOOD))
    assert ids == [0, 1, 2] and engine.counts()["waiting"] == 2
    engine.cancel(0)
    assert sorted(run(engine)) == ids


def _complete(engine: Engine, output: Any) -> None:
    batch = engine.next()
    assert batch is not None
    try:
        engine.complete(batch, output(batch))
    finally:
        engine.complete(batch, model(batch))  # still good


@pytest.mark.parametrize(
    ("output", "error", "sentence"),
    [
        (lambda b: b.x[:1], ValueError, r"has shape \[1, 3, 5\], expected \[2, 3, 5\]"),
        (lambda b: b.x.flatten(1), ValueError, r"has shape \[2, 15\], expected \[2, 3, 5\]"),
        (lambda b: b.x.double(), TypeError, "dtype torch.float64, expected torch.float32"),
        (lambda b: (b.x,), TypeError, "output is a tuple, expected a tensor"),
        (lambda b: b.x.to("meta"), ValueError, "output is on meta, expected cpu"),
    ],
)
def test_wrong_outputs_are_refused_and_change_nothing(
    output: Any, error: type[Exception], sentence: str
) -> None:
    engine = Engine(SHAPE)
    engine.submit(GOOD)
    with pytest.raises(error, match=sentence):
        _complete(engine, output)
    (result,) = run(engine).values()
    assert torch.equal(result.x, loop(GOOD))


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"plan": 7}, TypeError, "plan is a int, expected a sidestep.Plan"),
        ({"method": "paper"}, TypeError, r"method is a str, expected settings such as"),
        ({"x": 7}, TypeError, "x is no tensor of floating point numbers"),
        ({"x": torch.zeros(2, *SHAPE, dtype=torch.int64)}, TypeError, "x is no tensor of floating"),
        ({"x": latents(0, 2)[:, :1]}, ValueError, r"x has shape \[2, 1, 5\], expected \[n, 3, 5\]"),
        ({"x": latents(0, 0)}, ValueError, r"shape \[0, 3, 5\], .* n at least 1"),
        ({"x": latents(0, 5)}, ValueError, "5 rows, expected 1 to the capacity of 4"),
        ({"guidance": ()}, ValueError, r"guidance has shape \[0\], expected \[G\] or \[6, G\]"),
        (
            {"guidance": [(1, 2)] * 5},
            ValueError,
            r"guidance has shape \[5, 2\], expected .*\[6, G\]",
        ),
        ({"guidance": 7.5}, ValueError, r"guidance has shape \[\], expected \[G\] or \[6, G\]"),
        ({"guidance": [(1, 2), (3,)]}, ValueError, r"guidance is .*, expected .*\[6, G\] numbers"),
        ({"guidance": (1.0, float("nan"))}, ValueError, "guidance holds nan, expected finite"),
        ({"guidance": (1.0,) * 3}, ValueError, "has 3 branches, expected at most the engine's 2"),
        (
            {"plan": plan_of("sde-dpmsolver++2m", 4)},
            ValueError,
            "is stochastic, expected noise, got",
        ),
        (
            {"plan": plan_of("unipc3", 6)},
            ValueError,
            "has 5 registers, expected at most the engine",
        ),
    ],
)
def test_requests_are_checked(changes: dict, error: type[Exception], sentence: str) -> None:
    engine = Engine(SHAPE, capacity=4)
    with pytest.raises(error, match=sentence):
        engine.submit(replace(GOOD, **changes))
    assert engine.counts()["submitted"] == 0
    assert engine.submit(GOOD) == 0
    assert len(run(engine)) == 1


def test_methods_and_plans_that_do_not_fit() -> None:
    narrow = Engine(SHAPE, history=0)
    with pytest.raises(ValueError, match=r"looks back on 1 outputs, .* history of 0"):
        narrow.submit(replace(GOOD, method=PAPER))
    blind = Broken(decide())
    blind.criterion = lambda: SimpleNamespace(history=0, start=lambda course: None)  # type: ignore
    with pytest.raises(ValueError, match=r"looks back on 0 outputs, expected at least 1 and at"):
        narrow.submit(replace(GOOD, method=blind))
    schedule = sidestep.runtime.schedules.LinearVP()
    plan = sidestep.Solver().plan(schedule, "logsnr", 4, "epsilon", threshold=DynamicThreshold())
    with pytest.raises(ValueError, match=r"has a threshold, use Plan\.run"):
        narrow.submit(replace(GOOD, plan=plan))


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"shape": ()}, ValueError, r"shape is \[\], expected dimensions of 1 or more"),
        ({"shape": (4, 0)}, ValueError, r"shape is \[4, 0\], expected"),
        ({"dtype": torch.float64}, TypeError, "dtype is torch.float64, expected float32, float16"),
        ({"device": "meta"}, ValueError, "device is meta, expected a CPU or CUDA device"),
        ({"registers": 7}, ValueError, "registers is 7, expected 1 to 6"),
        ({"branches": 4}, ValueError, "branches is 4, expected 1 to 3"),
        ({"history": -1}, ValueError, "history is -1, expected 0 to"),
        ({"capacity": 0}, ValueError, "capacity is 0, expected 1 to"),
        ({"buckets": (4, 2)}, ValueError, r"buckets\[1\] is 2, expected 5 or more"),
    ],
)
def test_settings_are_checked(settings: dict, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Engine(**{"shape": SHAPE, **settings})


def test_the_engine_is_not_turned_from_inside() -> None:
    engine = Engine(SHAPE)
    engine.submit(replace(GOOD, on_step=Listener(0, engine.next)))
    (result,) = run(engine).values()
    assert "Engine.next: called from a callback inside Engine.complete" in str(result.error)


def test_clients_in_threads() -> None:
    engine = Engine(SHAPE, capacity=6, buckets=(1, 2, 4, 8))
    made = requests(24, methods=(None, PAPER))
    ids: dict[int, Request] = {}

    def client(first: int) -> None:
        for request in made[first::3]:
            ids[engine.submit(request)] = request

    clients = [threading.Thread(target=client, args=(first,)) for first in range(3)]
    for thread in clients:
        thread.start()
    results = {}
    while len(results) < 24:
        results |= run(engine)
    for thread in clients:
        thread.join()
    for id in sorted(ids)[::5]:
        alone = Engine(SHAPE, capacity=3)
        alone.submit(ids[id])
        (expected,) = run(alone).values()
        assert torch.equal(results[id].x, expected.x)


def test_gradients_and_inference_mode_are_no_matter() -> None:
    engine = Engine(SHAPE)
    engine.submit(replace(GOOD, x=GOOD.x.clone().requires_grad_()))
    weight = torch.ones((), requires_grad=True)

    def trained(batch: Batch) -> Tensor:
        return model(batch) * weight

    with torch.inference_mode():
        batch = engine.next()
        assert batch is not None
        engine.complete(batch, model(batch))
    (result,) = run(engine, trained).values()
    assert not result.x.requires_grad
    assert torch.equal(result.x, loop(GOOD))


def test_the_default_dtype_is_no_matter() -> None:
    expected = loop(GOOD)
    torch.set_default_dtype(torch.float64)
    try:
        engine = Engine(SHAPE)
        engine.submit(GOOD)
        (result,) = run(engine).values()
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.x.dtype == torch.float32 and torch.equal(result.x, expected)
