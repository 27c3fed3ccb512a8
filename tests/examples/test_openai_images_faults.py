"""The OpenAI-style endpoint when something breaks: what it says, and that it says so."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai_images import create_app
from prometheus_client.parser import text_string_to_metric_families
from serving_service import PATIENCE, Gate

from sidestep.models import load_pipeline
from sidestep.serving import ImageRequest, ImageResult, Limits, Service

PATH = "/v1/images/generations"
ASK = {"prompt": "frog", "num_inference_steps": 2}
FROG = ImageRequest(prompt="frog", steps=2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("emoji-sd")


def value(client: TestClient, name: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return next(s.value for family in families for s in family.samples if s.name == name)


def test_a_model_that_raises_is_a_500_and_the_next_request_a_200(pipe: Any) -> None:
    with TestClient(create_app(Service(pipe), "emoji-sd")) as client:
        gate = Gate(pipe)
        gate.errors[1] = RuntimeError("out of memory")
        gate.let(10)
        broken = client.post(PATH, json=ASK)
        assert broken.status_code == 500
        assert broken.json()["error"]["message"] == "out of memory"
        assert broken.json()["error"]["type"] == "server_error"
        assert client.post(PATH, json=ASK).status_code == 200
        gate.open()
        assert client.get("/health").status_code == 200
        assert value(client, "sidestep_failed_total") == value(client, "sidestep_done_total") == 1


def test_a_picture_that_cannot_be_sent_is_a_500(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(create_app(Service(pipe), "emoji-sd")) as client:
        monkeypatch.setattr(ImageResult, "as_dict", lambda _: 1 / 0)
        answer = client.post(PATH, json=ASK)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "division by zero"


def test_too_many_requests_are_a_429(pipe: Any) -> None:
    service = Service(pipe, limits=Limits(queue=1))
    with TestClient(create_app(service, "emoji-sd")) as client:
        gate = Gate(pipe)
        there = service.submit(FROG)
        refused = client.post(PATH, json=ASK)
        assert refused.status_code == 429 and "1 requests wait" in refused.text
        assert value(client, "sidestep_refused_total") == 1
        gate.open()
        there.result(PATIENCE)


def test_a_dead_worker_is_unhealthy(pipe: Any) -> None:
    service = Service(pipe)
    with TestClient(create_app(service, "emoji-sd")) as client:
        assert client.get("/health").json() == {"status": "ok"}
        gate = Gate(pipe)
        gate.errors[1] = SystemExit("the driver is gone")
        gate.let(1)
        lost = client.post(PATH, json=ASK)
        gate.open()
        assert lost.status_code == 503 and "the driver is gone" in lost.text
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "dead"})
        assert client.post(PATH, json=ASK).status_code == 503
        assert value(client, "sidestep_up") == value(client, "sidestep_running") == 0


def test_health_while_it_drains(pipe: Any) -> None:
    service = Service(pipe)
    with TestClient(create_app(service, "emoji-sd")) as client:
        gate = Gate(pipe)
        there = service.submit(FROG)
        assert not service.close(timeout=0.01)
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        refused = client.post(PATH, json=ASK)
        assert refused.status_code == 503 and "no requests any more" in refused.text
        gate.open()
        assert len(there.result(PATIENCE).images) == 1
