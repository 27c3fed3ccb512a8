"""The service behind LitServe, over HTTP."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import PIL.Image
import pytest
from serving_process import EXAMPLES, PATIENCE, free_port, running
from serving_service import LAST_BIT, difference, solo

from sidestep.models import load_pipeline
from sidestep.serving import ImageRequest


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    program, port = str(EXAMPLES / "litserve_server.py"), str(free_port())
    with running(program, "--port", port, listens=r"running on (http://\S+)") as process:
        process.wait_until_healthy()
        yield f"{process.url}/predict"


def ask(url: str, body: Any) -> httpx.Response:
    text = json.dumps(body)  # httpx's own leaves half a surrogate pair as it is, and fails
    return httpx.post(
        url, content=text, headers={"content-type": "application/json"}, timeout=PATIENCE
    )


def test_requests_share_calls_and_get_their_own_pictures(url: str) -> None:
    asked = [{"prompt": p, "seed": 5, "num_inference_steps": 6} for p in ("frog", "owl", "crab")]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda body: ask(url, body).json(), asked))
    pipe: Any = load_pipeline("emoji-sd")
    for body, answer in zip(asked, answers, strict=True):
        (alone,) = solo(pipe, ImageRequest(prompt=body["prompt"], seed=5, steps=6))
        made = PIL.Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
        assert difference(made, alone) <= LAST_BIT
        assert answer["statistics"]["model_calls"] == [6]


def test_bad_requests(url: str) -> None:
    for body, sentence in (
        ({"prompt": "frog", "num_inference_steps": 0}, "steps is 0, expected a whole number"),
        ({"prompt": "frog", "steps": 1}, "'steps' is unknown, expected prompt,"),
        ({"prompt": "\ud800"}, "prompt has half a surrogate pair, expected text"),
        ({"prompt": "frog", "\ud800": 1}, r"'\ud800' is unknown, expected prompt,"),
        ({"prompt": "frog", "solver": []}, "solver is [], expected one of"),
        ({}, "prompt is missing, expected text"),
    ):
        answer = ask(url, body)
        assert answer.status_code == 400 and sentence in answer.json()["detail"]
    assert ask(url, {"prompt": "frog", "num_inference_steps": 1}).status_code == 200
