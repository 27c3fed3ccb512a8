"""A service whose clients do what they should not: they refuse, leave, or hold up its thread."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from serving_service import PATIENCE, Gate

from sidestep.models import load_pipeline
from sidestep.runtime.engine_table import PlanTable
from sidestep.serving import ImageRequest, Limits, Service, ServiceClosed, ServiceDead

FROG = ImageRequest(prompt="frog on a bicycle", steps=4)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("emoji-sd")


def test_refused_requests_do_not_stop_the_others(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refused request is followed by another, for ever."""
    plain, refusals = pipe.encode_prompt, []

    def encode(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        if prompt != ["bad"]:
            return plain(prompt, *args, **kwargs)
        refusals.append(service.counts()["ticks"])
        assert len(refusals) < 100
        service.submit(replace(FROG, prompt="bad"))
        raise ValueError("bad words")

    with Service(pipe) as service:
        gate = Gate(pipe)
        monkeypatch.setattr(pipe, "encode_prompt", encode)
        frog = service.submit(FROG)
        gate.arrive()
        bad = service.submit(replace(FROG, prompt="bad"))
        gate.open()
        assert len(frog.result(PATIENCE).images) == 1
        with pytest.raises(ValueError, match="bad words"):
            bad.result(0)
        assert service.close(drain=False)
    assert refusals[:3] == [1, 2, 3]  # one between two calls


def test_who_has_the_answer_is_counted_out(pipe: Any) -> None:
    """The next request has the place of the last, and the numbers know of it, in a callback too."""
    with Service(pipe, limits=Limits(queue=1)) as service:
        seen: list[dict[str, float]] = []
        again: list[Future[Any]] = []

        def told(_: Future[Any]) -> None:
            seen.append(service.counts())
            again.append(service.submit(replace(FROG, steps=1)))

        service.submit(FROG).add_done_callback(told)
        while not again:
            threading.Event().wait(0.01)
        assert len(again[0].result(PATIENCE).images) == 1
    assert (seen[0]["running"], seen[0]["waiting"], seen[0]["done"]) == (0, 0, 1)
    assert seen[0]["evaluated"] == 4


def test_who_leaves_while_it_is_prepared_costs_no_call(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipe.encode_prompt
    made: list[Future[Any]] = []
    known = threading.Event()

    def encode(*args: Any, **kwargs: Any) -> Any:
        assert known.wait(PATIENCE)
        made[0].cancel()
        return plain(*args, **kwargs)

    with Service(pipe) as service:
        monkeypatch.setattr(pipe, "encode_prompt", encode)
        made.append(service.submit(FROG))
        known.set()
        assert service.close()
        counts = service.counts()
    assert (counts["cancelled"], counts["done"], counts["ticks"]) == (1, 0, 0)


def test_closing_at_once_stays_so(pipe: Any) -> None:
    service = Service(pipe)
    gate = Gate(pipe)
    frog = service.submit(FROG)
    gate.arrive()
    assert not service.close(drain=False, timeout=0.01)
    assert not service.close(drain=True, timeout=0.01)
    gate.open()
    assert service.close()
    with pytest.raises(ServiceClosed, match="before the pictures were done"):
        frog.result(0)


def test_a_callback_can_close(pipe: Any) -> None:
    service = Service(pipe)
    ended: list[bool] = []
    first, second = service.submit(replace(FROG, steps=2)), service.submit(FROG)
    first.add_done_callback(lambda _: ended.append(service.close()))
    assert len(second.result(PATIENCE).images) == 1
    assert service.close() and service.state == "closed" and ended == [False]


def test_a_callback_that_breaks_the_thread_keeps_no_other_waiting(pipe: Any) -> None:
    def leave(_: Future[Any]) -> None:
        raise SystemExit("enough")

    service = Service(pipe)
    gate = Gate(pipe)
    gate.errors[1] = SystemExit("the driver is gone")
    futures = [service.submit(FROG) for _ in range(3)]
    for future in futures:
        future.add_done_callback(leave)
    gate.arrive()
    gate.open()
    for future in futures:
        with pytest.raises(ServiceDead):
            future.result(PATIENCE)
    service.close()
    assert service.counts()["running"] == service.counts()["waiting"] == 0


def test_plans_that_the_table_does_not_hold_wait(pipe: Any) -> None:
    with Service(pipe) as service:
        (lane,) = service._lanes.values()
        state = lane.engine._state
        state.table = PlanTable(lane.engine.registers, 10, state.device)
        gate = Gate(pipe)
        first, second = service.submit(FROG), service.submit(replace(FROG, steps=7))
        gate.arrive()
        assert service.counts()["running"] == service.counts()["waiting"] == 1
        gate.open()
        assert [len(each.result(PATIENCE).images) for each in (first, second)] == [1, 1]
        assert second.result().statistics.ticks == 7 and service.counts()["ticks"] == 11
        with pytest.raises(RuntimeError, match="no room for the 12 steps"):
            service.submit(replace(FROG, steps=12)).result(PATIENCE)
        assert service.counts()["running"] == service.counts()["waiting"] == 0


def test_a_request_fits_the_engine(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"4 pictures in a request, expected at most capacity, 2"):
        Service(pipe, capacity=2, limits=Limits())
    with Service(pipe, capacity=2) as service:
        assert service.limits.n == 2
