"""The service in two replicas of a Ray Serve deployment, over HTTP."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import PIL.Image
import pytest
from serving_process import EXAMPLES, PATIENCE, Process, free_port, running
from serving_service import LAST_BIT, difference, solo

from sidestep.models import load_pipeline
from sidestep.serving import ImageRequest


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    program, port = str(EXAMPLES / "ray_serve.py"), str(free_port())
    try:
        with running(
            program, "--port", port, "--cpus", "0.5", listens=r"serving on (http://\S+)"
        ) as process:
            yield process
            process.terminate()
            assert process.wait() == 0, "".join(process.output)
    finally:
        patch.undo()


def test_replicas_share_the_requests(server: Process) -> None:
    asked = [{"prompt": "frog", "seed": i, "num_inference_steps": 4} for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda body: httpx.post(server.url, json=body, timeout=PATIENCE), asked)
        )
    assert [answer.status_code for answer in answers] == [200] * 8
    made = [answer.json() for answer in answers]
    assert len({each["replica"] for each in made}) == 2
    pipe: Any = load_pipeline("emoji-sd")
    for body, each in zip(asked, made, strict=True):
        (alone,) = solo(pipe, ImageRequest(prompt="frog", seed=body["seed"], steps=4))
        image = PIL.Image.open(io.BytesIO(base64.b64decode(each["images"][0])))
        assert difference(image, alone) <= LAST_BIT
        assert each["statistics"]["saved_calls"] == [0]


def test_bad_requests(server: Process) -> None:
    for body, sentence in (
        (b"{", "the body is no JSON"),
        (b"", "the body is a NoneType, expected an object"),
        (b"[" * 100_000, "the body is no JSON"),
        (b'{"prompt": "frog", "\\ud800": 1}', r"'\ud800' is unknown, expected prompt,"),
        (b'{"prompt": "frog", "method": []}', "method is [], expected one of"),
        (b'{"prompt": "frog", "n": 9}', "n is 9, expected a whole number from 1 to 4"),
    ):
        answer = httpx.post(server.url, content=body, timeout=PATIENCE)
        assert answer.status_code == 400 and sentence in answer.json()["error"]
    answer = httpx.post(server.url, content=b"x" * (1 << 21), timeout=PATIENCE)
    assert answer.status_code == 413 and "expected at most 1048576" in answer.json()["error"]
