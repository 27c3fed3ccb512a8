"""The OpenAI-style endpoint: `openai` makes pictures from a process, and 64 clients at a time."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import PIL.Image
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_process import EXAMPLES, PATIENCE, Process, running
from serving_service import LAST_BIT, difference, solo

from sidestep.models import load_pipeline, load_prompts
from sidestep.serving import ImageRequest

LISTENS = r"running on (http://\S+)"
PATH = "/v1/images/generations"
NO_TEXT = "Input should be a valid string, unable to parse raw data as a unicode string"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("emoji-sd")


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with running(str(EXAMPLES / "openai_images.py"), "--port", "0", listens=LISTENS) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    ) as made:
        yield made


def metrics(url: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=PATIENCE).text)
    samples = [sample for family in families for sample in family.samples]
    return {s.name + "".join(s.labels.values()): s.value for s in samples}


def picture(b64: str | None) -> PIL.Image.Image:
    assert b64 is not None
    return PIL.Image.open(io.BytesIO(base64.b64decode(b64)))


def test_the_openai_client_makes_pictures(pipe: Any, client: openai.OpenAI) -> None:
    before = metrics(str(client.base_url).removesuffix("/v1/"))
    made = client.images.generate(
        model="emoji-sd", prompt="frog on a bicycle", n=2, size="64x64",
        extra_body={"num_inference_steps": 4, "guidance_scale": 5, "seed": 3},
    )  # fmt: skip
    request = ImageRequest(prompt="frog on a bicycle", n=2, steps=4, guidance=5, seed=3)
    assert made.data is not None and len(made.data) == 2
    for each, alone in zip(made.data, solo(pipe, request), strict=True):
        assert difference(picture(each.b64_json), alone) <= LAST_BIT
    statistics = made.statistics  # type: ignore[attr-defined]
    assert statistics["model_calls"] == [4, 4] and statistics["saved_calls"] == [0, 0]
    assert statistics["steps"] == statistics["ticks"] == 4
    assert [model.id for model in client.models.list()] == ["emoji-sd"]

    adaptive = client.images.generate(
        model="emoji-sd", prompt="owl", extra_body={"num_inference_steps": 12, "method": "adaptive"}
    ).statistics  # type: ignore[attr-defined]
    assert 0 < adaptive["model_calls"][0] < 12
    assert adaptive["saved_calls"][0] == 12 - adaptive["model_calls"][0]

    after = metrics(str(client.base_url).removesuffix("/v1/"))
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["sidestep_done_total"] == 2 and grown["sidestep_pictures_total"] == 3
    assert grown["sidestep_evaluated_total"] == 8 + adaptive["model_calls"][0]
    assert grown["sidestep_saved"] == adaptive["saved_calls"][0]
    assert grown["sidestep_ticks_total"] == 4 + adaptive["model_calls"][0]
    assert after["sidestep_up"] == 1 and after["sidestep_running"] == 0


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"prompt": " "}, "prompt is empty, expected text"),
        ({"prompt": None}, "prompt: Input should be a valid string"),
        ({"prompt": "x" * 2001}, "prompt has 2001 characters, expected at most 2000"),
        ({"size": "65x64"}, "size is 65x64, expected one of 64x64"),
        ({"size": "large"}, "size is 'large', expected WIDTHxHEIGHT"),
        ({"n": 5}, "n is 5, expected a whole number from 1 to 4"),
        ({"n": "1"}, "n: Input should be a valid integer"),
        ({"response_format": "url"}, "response_format: Input should be 'b64_json'"),
        ({"num_inference_steps": 151}, "steps is 151, expected a whole number from 1 to 150"),
        ({"guidance_scale": 1e9}, "guidance is 1000000000.0, expected 0 to 50"),
        ({"method": "magic"}, "method is 'magic', expected one of none, adaptive, srds"),
        ({"steps": 3}, "steps: Extra inputs are not permitted"),
        ({"\ud800": 3}, f"the body: {NO_TEXT}"),
        ({"prompt": "\ud800"}, "prompt has half a surrogate pair, expected text"),
        ({"guidance_scale": 10**400}, "guidance_scale: Input should be a valid number"),
        ({"method": []}, "method: Input should be a valid string"),
    ],
)
def test_bad_requests(server: Process, change: dict[str, Any], sentence: str) -> None:
    answer = httpx.post(
        server.url + PATH,
        content=json.dumps({"prompt": "frog", **change}),
        headers=JSON,
        timeout=PATIENCE,
    )
    assert answer.status_code == 400
    said = answer.json()["error"]
    assert (said["message"], said["type"]) == (sentence, "invalid_request_error")


def test_other_bad_requests(server: Process, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model is 'dall-e-3', expected 'emoji-sd'"):
        client.images.generate(model="dall-e-3", prompt="frog")
    url = server.url + PATH
    deep = b"[" * 100_000
    for body, status in ((b"{", 400), (b"", 400), (deep, 400), (b"x" * (1 << 21), 413)):
        answer = httpx.post(url, content=body, headers=JSON, timeout=PATIENCE)
        assert answer.status_code == status and answer.json()["error"]["message"]
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as http:
        assert http.post(PATH, content=iter([b"{}"]), headers=JSON).status_code == 413
        assert http.get(PATH).status_code == 405 and http.get("/no").status_code == 404
        assert http.get("/health").json() == {"status": "ok"}
    assert metrics(server.url)["sidestep_http_total413"] >= 2


def test_a_client_that_goes_away_frees_its_rows(server: Process) -> None:
    before = metrics(server.url)

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE) as http:
            ask = {"prompt": "frog", "num_inference_steps": 150, "n": 4}
            asking = asyncio.create_task(http.post(server.url + PATH, json=ask))
            while metrics(server.url)["sidestep_ticks_total"] < before["sidestep_ticks_total"] + 2:
                await asyncio.sleep(0.02)
            asking.cancel()
            while metrics(server.url)["sidestep_running"]:
                await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(leave(), PATIENCE))
    after = metrics(server.url)
    assert after["sidestep_cancelled_total"] == before["sidestep_cancelled_total"] + 1
    assert after["sidestep_ticks_total"] < before["sidestep_ticks_total"] + 150


def test_64_clients_at_a_time(pipe: Any, server: Process) -> None:
    """Nothing is lost, and every picture is that of its client alone."""
    prompts = load_prompts("novel")
    asked = [ImageRequest(prompt=p, seed=i, steps=3 + i % 2) for i, p in enumerate(prompts)]
    assert len(asked) == 64
    start = threading.Barrier(64)
    before = metrics(server.url)

    def ask(request: ImageRequest) -> PIL.Image.Image:
        body = {
            "prompt": request.prompt, "seed": request.seed, "num_inference_steps": request.steps
        }  # fmt: skip
        with httpx.Client(timeout=PATIENCE) as http:  # making one takes longer than a step
            start.wait(PATIENCE)
            answer = http.post(server.url + PATH, json=body)
        assert answer.status_code == 200, answer.text
        return picture(answer.json()["data"][0]["b64_json"])

    with ThreadPoolExecutor(64) as pool:
        made = list(pool.map(ask, asked))
    grown = {name: value - before.get(name, 0) for name, value in metrics(server.url).items()}
    assert grown["sidestep_done_total"] == grown["sidestep_http_total200"] - 1 == 64
    assert grown["sidestep_evaluated_total"] == sum(request.steps for request in asked)
    assert grown["sidestep_ticks_total"] < 224 / 2  # 224 of them one by one
    for request, image in zip(asked, made, strict=True):
        (alone,) = solo(pipe, request)
        assert difference(image, alone) <= LAST_BIT


def test_sigterm_drains() -> None:
    """What was asked is answered, the port is closed, and the process ends with 0."""
    with running(str(EXAMPLES / "openai_images.py"), "--port", "0", listens=LISTENS) as process:
        url, pool = process.url, ThreadPoolExecutor(2)
        ask = {"prompt": "frog", "num_inference_steps": 100}
        asked = [pool.submit(httpx.post, url + PATH, json=ask, timeout=PATIENCE) for _ in range(2)]
        while metrics(url)["sidestep_running"] < 2:
            time.sleep(0.05)
        process.terminate()
        answers = [future.result(PATIENCE) for future in asked]
        assert [len(answer.json()["data"]) for answer in answers] == [1, 1]
        assert process.wait() in (0, -15)  # uvicorn raises the signal again when it is done
        assert "Application shutdown complete" in "".join(process.output)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
