"""The model for Triton Inference Server, driven by a stand-in for the server."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest
import triton_backend as backend
from serving_process import EXAMPLES
from serving_service import LAST_BIT, Gate, difference, solo

from sidestep.models import load_pipeline
from sidestep.serving import ImageRequest, Statistics

FOLDER = EXAMPLES / "triton_model"
CONFIG = backend.read_config(FOLDER / "config.pbtxt")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    spec = importlib.util.spec_from_file_location("triton_model", FOLDER / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.TritonPythonModel()
    made.initialize({"model_config": json.dumps(CONFIG), "model_name": CONFIG["name"]})
    yield made
    made.finalize()


def asked(model: Any, **inputs: Any) -> backend.Sender:
    request = backend.Request(CONFIG, inputs)
    assert model.execute([request]) is None
    return request.sender


def test_the_configuration() -> None:
    assert CONFIG["name"] == FOLDER.name and CONFIG["backend"] == "python"
    assert CONFIG["model_transaction_policy"] == {"decoupled": True}
    assert CONFIG["max_batch_size"] == 0


def test_requests_share_calls_and_get_their_own_pictures(model: Any) -> None:
    gate = Gate(model.service.pipe)
    frog = asked(model, PROMPT=[b"frog"], SEED=[7], NUM_INFERENCE_STEPS=[4])
    gate.arrive()
    owls = asked(
        model, PROMPT=[b"owl"], NEGATIVE_PROMPT=[b"hat"], N=[2], NUM_INFERENCE_STEPS=[5],
        GUIDANCE_SCALE=[3.0], METHOD=[b"none"],
    )  # fmt: skip
    gate.open()
    made = [frog.outputs(), owls.outputs()]
    assert model.service.counts()["ticks"] == 6  # 9 alone
    requests = [
        ImageRequest(prompt="frog", seed=7, steps=4),
        ImageRequest(prompt="owl", negative_prompt="hat", n=2, steps=5, guidance=3.0),
    ]
    model.service.close()
    for request, outputs in zip(requests, made, strict=True):
        assert outputs["IMAGES"].shape == (request.n, 64, 64, 3)
        pictures = solo(load_pipeline("emoji-sd"), request)
        for values, alone in zip(outputs["IMAGES"], pictures, strict=True):
            assert difference(PIL.Image.fromarray(values), alone) <= LAST_BIT
        statistics = json.loads(outputs["STATISTICS"][0])
        assert statistics["model_calls"] == [request.steps] * request.n


def test_bad_requests_and_clients_that_leave(model: Any) -> None:
    for inputs, sentence in (
        ({"PROMPT": [b""]}, "prompt is empty, expected text"),
        ({"PROMPT": [b"\xff"]}, "PROMPT is no UTF-8"),
        ({"PROMPT": [b"frog"], "N": [9]}, "n is 9, expected a whole number from 1 to 4"),
        ({"PROMPT": [b"frog"], "METHOD": [b"magic"]}, "method is 'magic', expected one of"),
    ):
        error = asked(model, **inputs).error()
        assert sentence in error.message and error.code == backend.TritonError.INVALID_ARG
    gate = Gate(model.service.pipe)
    gone = asked(model, PROMPT=[b"frog"], NUM_INFERENCE_STEPS=[150])
    gate.arrive()
    gone.cancelled = True
    assert gone.error().code == backend.TritonError.CANCELLED
    stays = asked(model, PROMPT=[b"frog"], NUM_INFERENCE_STEPS=[2])
    gate.open()
    assert np.isfinite(stays.outputs()["IMAGES"]).all()
    counts = model.service.counts()
    assert (counts["cancelled"], counts["done"]) == (1, 1) and counts["ticks"] <= 4


def test_a_sender_that_does_not_answer_is_gone_and_others_are_not(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> bool:
        raise RuntimeError("no such request")

    gate = Gate(model.service.pipe)
    first, second = (asked(model, PROMPT=[b"frog"], NUM_INFERENCE_STEPS=[150]) for _ in range(2))
    gate.arrive()
    monkeypatch.setattr(first, "is_cancelled", broken)
    assert first.error().code == backend.TritonError.CANCELLED
    second.cancelled = True
    assert second.error().code == backend.TritonError.CANCELLED
    gate.open()


def test_a_result_that_cannot_be_sent_is_an_error(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Statistics, "as_dict", lambda _: 1 / 0)
    error = asked(model, PROMPT=[b"frog"], NUM_INFERENCE_STEPS=[1]).error()
    assert error.code == backend.TritonError.INTERNAL and error.message == "division by zero"


def test_a_service_that_takes_no_more_is_unavailable(model: Any) -> None:
    model.service.close()
    error = asked(model, PROMPT=[b"frog"]).error()
    assert error.code == backend.TritonError.UNAVAILABLE
    assert error.message == "the service takes no requests any more"


def test_what_the_model_raises_is_an_internal_error(model: Any) -> None:
    gate = Gate(model.service.pipe)
    gate.errors[1] = RuntimeError("out of memory")
    broken = asked(model, PROMPT=[b"frog"], NUM_INFERENCE_STEPS=[2])
    gate.let(1)
    assert broken.error().code == backend.TritonError.INTERNAL
    gate.open()
    assert asked(model, PROMPT=[b"frog"], NUM_INFERENCE_STEPS=[2]).outputs()
