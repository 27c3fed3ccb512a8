"""A service: requests of many clients share model calls, and each gets its own picture."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from serving_service import LAST_BIT, PATIENCE, Gate, difference, one_at_a_time, solo

from sidestep import SRDS, Adaptive
from sidestep.adapters.swap import owner_of
from sidestep.models import load_pipeline
from sidestep.serving import (
    BadRequest,
    ImageRequest,
    Limits,
    Overloaded,
    Service,
    ServiceClosed,
    ServiceDead,
)

FROG = ImageRequest(prompt="frog on a bicycle", steps=4)
METHODS = {
    "adaptive": Adaptive(mode="paper", threshold=0.5, max_skip=2),
    "srds": SRDS(max_iterations=1),
}
MIXED = [
    FROG,
    ImageRequest(prompt="cat with an umbrella", seed=1, steps=6, n=2),
    ImageRequest(prompt="owl", negative_prompt="hat", seed=2, steps=5, guidance=3.0),
    ImageRequest(prompt="lemon face", seed=3, steps=8, solver="euler"),
    ImageRequest(prompt="crab", seed=4, steps=3, guidance=1.0),
]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("emoji-sd")


@pytest.fixture
def service(pipe: Any) -> Iterator[Service]:
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with Service(pipe, methods=METHODS, solvers={"euler": euler}) as made:
        yield made


def test_requests_share_ticks_and_get_the_pictures_of_the_plain_pipeline(
    pipe: Any, service: Service
) -> None:
    gate = Gate(pipe)
    results = [service.submit(request) for request in MIXED[:1]]
    gate.arrive()  # the others come while the first is with the model
    results += [service.submit(request) for request in MIXED[1:]]
    gate.open()
    made = [future.result(PATIENCE) for future in results]
    assert service.counts()["ticks"] <= 1 + max(request.steps for request in MIXED)
    service.close()
    for request, result in zip(MIXED, made, strict=True):
        assert len(result.images) == request.n
        scheduler = service.solvers.get(request.solver or "")
        for image, alone in zip(result.images, solo(pipe, request, scheduler), strict=True):
            assert image.size == (64, 64) and difference(image, alone) <= LAST_BIT
        assert result.statistics.model_calls == (request.steps,) * request.n
        assert result.statistics.saved_calls == (0,) * request.n


def test_bits_do_not_depend_on_who_else_was_there(pipe: Any) -> None:
    asked = [*MIXED[:3], replace(FROG, method="adaptive", steps=8), replace(FROG, method="srds")]
    with one_at_a_time(pipe) as sizes, Service(pipe, methods=METHODS) as service:
        together = [future.result(PATIENCE) for future in [service.submit(each) for each in asked]]
        assert max(sizes) > 8
        for request, result in zip(asked, together, strict=True):
            alone = service.submit(request).result(PATIENCE)
            assert torch.equal(alone.latents, result.latents)
            for image, other in zip(alone.images, result.images, strict=True):
                assert difference(image, other) == 0
            assert alone.statistics.model_calls == result.statistics.model_calls


def test_saved_calls_are_counted(service: Service) -> None:
    adaptive = (
        service.submit(replace(FROG, steps=10, method="adaptive")).result(PATIENCE).statistics
    )
    (calls,), (saved,) = adaptive.model_calls, adaptive.saved_calls
    assert calls < 10 and calls + saved == 10 and adaptive.ticks == calls
    srds = service.submit(replace(FROG, steps=9, method="srds")).result(PATIENCE).statistics
    assert srds.ticks < 9 < srds.model_calls[0] and srds.saved_calls[0] < 0
    counts = service.counts()
    assert (counts["done"], counts["pictures"]) == (2, 2)
    assert counts["evaluated"] == calls + srds.model_calls[0]
    assert counts["saved"] == saved + srds.saved_calls[0]
    assert srds.as_dict()["saved_calls"] == list(srds.saved_calls)


def test_a_client_that_goes_away_frees_its_rows(pipe: Any, service: Service) -> None:
    gate = Gate(pipe)
    first = service.submit(FROG)
    gate.arrive()
    second, third = service.submit(replace(FROG, n=3)), service.submit(FROG)
    gate.let(1)
    gate.arrive()
    assert gate.sizes == [2, 10]
    assert second.cancel()
    gate.let(1)
    gate.arrive()
    assert gate.sizes == [2, 10, 4]
    gate.open()
    assert len(first.result(PATIENCE).images) == len(third.result(PATIENCE).images) == 1
    counts = service.counts()
    assert (counts["done"], counts["cancelled"], counts["running"]) == (2, 1, 0)


def test_one_that_waits_can_go_away(pipe: Any) -> None:
    with Service(pipe, capacity=1) as service:
        gate = Gate(pipe)
        first, second = service.submit(FROG), service.submit(FROG)
        gate.arrive()
        assert service.counts()["waiting"] == 1 and second.cancel()
        gate.open()
        first.result(PATIENCE)
        assert service.submit(FROG).result(PATIENCE).statistics.queued_seconds > 0
        assert service.counts()["cancelled"] == 1 and service.counts()["done"] == 2


def test_a_cancelled_coroutine_cancels_its_request(pipe: Any, service: Service) -> None:
    gate = Gate(pipe)

    async def leave() -> None:
        task = asyncio.create_task(service.generate(FROG))
        await asyncio.to_thread(gate.arrive)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    gate.open()
    service.submit(FROG).result(PATIENCE)
    assert service.counts()["cancelled"] == 1 and len(gate.sizes) <= 2


def test_what_the_model_raises_fails_the_requests_in_that_call(pipe: Any) -> None:
    with Service(pipe, capacity=2) as service:
        gate = Gate(pipe)
        gate.errors[2] = RuntimeError("out of memory")
        both, waits = service.submit(replace(FROG, n=2)), service.submit(FROG)
        gate.let(2)
        with pytest.raises(RuntimeError, match="out of memory"):
            both.result(PATIENCE)
        gate.open()
        assert len(waits.result(PATIENCE).images) == 1 and service.state == "ok"
        counts = service.counts()
        assert (counts["failed"], counts["done"]) == (1, 1)


@pytest.mark.parametrize("stage", ["encode_prompt", "vae.decode"])
def test_what_the_pipeline_raises_fails_its_request_alone(
    pipe: Any, service: Service, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    owner = pipe.vae if stage == "vae.decode" else pipe
    name, calls = stage.split(".")[-1], []
    plain = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("it broke")
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)
    first, second = service.submit(FROG), service.submit(FROG)
    with pytest.raises(RuntimeError, match="it broke"):
        first.result(PATIENCE)
    assert len(second.result(PATIENCE).images) == 1 and service.state == "ok"


def test_closing_finishes_what_was_asked(pipe: Any) -> None:
    service = Service(pipe, capacity=1)
    futures = [service.submit(FROG) for _ in range(3)]
    assert owner_of(pipe.unet) is not None
    assert service.close() and service.state == "closed"
    assert [len(future.result(0).images) for future in futures] == [1, 1, 1]
    with pytest.raises(ServiceClosed, match="no requests any more"):
        service.submit(FROG)
    assert owner_of(pipe.unet) is None and owner_of(pipe.scheduler) is None


def test_closing_at_once_fails_the_rest(pipe: Any) -> None:
    service = Service(pipe, capacity=1)
    gate = Gate(pipe)
    futures = [service.submit(FROG) for _ in range(2)]
    gate.arrive()
    assert not service.close(drain=False, timeout=0.01) and service.state == "draining"
    gate.open()
    assert service.close(drain=False)
    for future in futures:
        with pytest.raises(ServiceClosed, match="before the pictures were done"):
            future.result(0)
    assert service.counts()["failed"] == 2


def test_a_dead_service_says_so(pipe: Any) -> None:
    service = Service(pipe, capacity=1)
    gate = Gate(pipe)
    gate.errors[1] = SystemExit("the driver is gone")
    running, waiting = service.submit(FROG), service.submit(FROG)
    gate.arrive()
    gate.open()
    for future in (running, waiting):
        with pytest.raises(ServiceDead, match="the driver is gone"):
            future.result(PATIENCE)
    service.close()
    assert service.state == "dead" and isinstance(service.error, SystemExit)
    with pytest.raises(ServiceDead, match="the driver is gone"):
        service.submit(FROG)
    assert service.counts()["running"] == service.counts()["waiting"] == 0


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"prompt": " "}, "prompt is empty, expected text"),
        ({"prompt": 3}, "prompt is a int, expected text"),
        ({"prompt": "x" * 51}, "prompt has 51 characters, expected at most 50"),
        ({"negative_prompt": "x" * 51}, "negative_prompt has 51 characters, expected at most 50"),
        ({"steps": 0}, "steps is 0, expected a whole number from 1 to 20"),
        ({"steps": 21}, "steps is 21, expected a whole number from 1 to 20"),
        ({"steps": True}, "steps is True, expected a whole number from 1 to 20"),
        ({"steps": 2.5}, "steps is 2.5, expected a whole number from 1 to 20"),
        ({"n": 3}, "n is 3, expected a whole number from 1 to 2"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0 to 9223372036854775805"),
        ({"guidance": float("nan")}, "guidance is nan, expected 0 to 50"),
        ({"guidance": 51}, "guidance is 51, expected 0 to 50"),
        ({"size": (8, 8)}, "size is 8x8, expected one of 64x64"),
        ({"guidance": 10**400}, f"guidance is 1{'0' * 99}..., expected 0 to 50"),
        (
            {"steps": 10**5000},
            "steps is a int too large to show, expected a whole number from 1 to 20",
        ),
        ({"prompt": "\ud800"}, "prompt has half a surrogate pair, expected text"),
        ({"negative_prompt": "\ud800"}, "negative_prompt has half a surrogate pair, expected text"),
        ({"size": [[]]}, "size is [[]], expected one of 64x64"),
        ({"method": []}, "method is [], expected one of none, adaptive, srds"),
        ({"solver": {}}, "solver is {}, expected one of euler"),
        ({"method": "magic"}, "method is 'magic', expected one of none, adaptive, srds"),
        ({"solver": "magic"}, "solver is 'magic', expected one of euler"),
    ],
)
def test_limits(change: dict[str, Any], sentence: str) -> None:
    limits = Limits(steps=20, n=2, prompt=50)
    with pytest.raises(BadRequest) as refused:
        limits.check(
            replace(FROG, **change), [(64, 64)], {"none": None, **METHODS}, {"euler": None}
        )
    assert str(refused.value) == sentence


def test_a_limit_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="queue is 0, expected 1 or more"):
        Limits(queue=0)


def test_too_many_requests(pipe: Any) -> None:
    with Service(pipe, limits=Limits(queue=2)) as service:
        gate = Gate(pipe)
        futures = [service.submit(FROG) for _ in range(2)]
        with pytest.raises(Overloaded, match="2 requests wait or run"):
            service.submit(FROG)
        gate.open()
        assert all(future.result(PATIENCE) for future in futures)
        service.submit(FROG).result(PATIENCE)
        assert service.counts()["refused"] == 1


def test_what_the_pipeline_refuses_is_a_bad_request(service: Service) -> None:
    with pytest.raises(BadRequest, match="1001"):
        service.limits = Limits(steps=2000)
        service.submit(replace(FROG, steps=1001)).result(PATIENCE)
    assert service.submit(FROG).result(PATIENCE).images


def test_sizes(pipe: Any) -> None:
    with Service(pipe, sizes=[(32, 32), (64, 32)]) as service:
        assert service.sizes == ((32, 32), (64, 32))
        futures = [service.submit(replace(FROG, size=size)) for size in (None, (64, 32), (32, 32))]
        made = [future.result(PATIENCE) for future in futures]
        assert [result.images[0].size for result in made] == [(32, 32), (64, 32), (32, 32)]
        assert difference(made[0].images[0], made[2].images[0]) == 0
        assert service.counts()["ticks"] == 8  # a size, an engine
        with pytest.raises(BadRequest, match="size is 64x64, expected one of 32x32, 64x32"):
            service.submit(replace(FROG, size=(64, 64)))


def test_fields_of_json() -> None:
    fields = {"prompt": "owl", "num_inference_steps": 3, "guidance_scale": 2.0, "size": "64x32"}
    asked = ImageRequest(prompt="owl", steps=3, guidance=2.0, size=(64, 32))
    assert ImageRequest.of({**fields, "seed": None}) == asked
    assert ImageRequest.of({"prompt": "owl", "size": "auto"}) == ImageRequest(prompt="owl")
    for wrong, sentence in (
        ([], "the body is a list, expected an object"),
        ({}, "prompt is missing, expected text"),
        ({"prompt": "owl", "steps": 3}, "'steps' is unknown, expected prompt, negative_prompt,"),
        ({"prompt": "owl", "\ud800": 3}, r"'\ud800' is unknown, expected prompt, negative_prompt,"),
        ({"prompt": "owl", "size": "64x"}, "size is '64x', expected WIDTHxHEIGHT"),
        ({"prompt": "owl", "size": 64}, "size is 64, expected WIDTHxHEIGHT"),
    ):
        with pytest.raises(BadRequest) as refused:
            ImageRequest.of(wrong)
        assert str(refused.value).startswith(sentence)


def test_a_pipeline_that_cannot_be_served_is_left_alone(pipe: Any) -> None:
    with pytest.raises(ValueError, match="divisible by 8"):
        Service(pipe, sizes=[(65, 64)])
    assert owner_of(pipe.unet) is None and owner_of(pipe) is None
