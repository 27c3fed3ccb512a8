"""A `sidestep.serving.Service` as a model of Triton Inference Server's Python backend.

Copy the folder `triton_model` into a model repository.  The model is decoupled: `execute` only
submits, and an answer is sent when its pictures are there, so that requests which come while others
are on their way share model calls with them.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
from concurrent.futures import CancelledError, Future
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from sidestep.models import load_pipeline
from sidestep.serving import (
    BadRequest,
    ImageRequest,
    ImageResult,
    Overloaded,
    Service,
    ServiceClosed,
    ServiceDead,
)

LOOK = 0.05  # seconds between two looks for clients that have gone


class TritonPythonModel:
    """Pictures of the model that `config.pbtxt` names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the pipeline."""
        config = json.loads(args["model_config"])
        given = {name: of["string_value"] for name, of in config["parameters"].items()}
        self.inputs = [tensor["name"] for tensor in config["input"]]
        pipe = load_pipeline(given["model"], device=given["device"], safety_checker=True)
        self.service = Service(pipe, capacity=int(given["capacity"]))
        self.waiting: dict[Future[ImageResult], Any] = {}
        self.lock, self.ended = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        """Submits the requests."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                future = self.service.submit(ImageRequest.of(self._fields(request)))
            except Exception as error:
                self._send(sender, failure(error))
                continue
            with self.lock:
                self.waiting[future] = sender
            future.add_done_callback(functools.partial(self._answer, sender))

    def finalize(self) -> None:
        """Finishes what was asked."""
        self.service.close()
        self.ended.set()

    def _fields(self, request: Any) -> dict[str, Any]:
        """The inputs by the names that the other servers have for them."""
        found = {}
        for name in self.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                values = tensor.as_numpy().reshape(-1)
                if len(values) != 1:
                    raise BadRequest(f"{name} has {len(values)} values, expected 1")
                found[name.lower()] = plain(name, values[0])
        return found

    def _answer(self, sender: Any, future: Future[ImageResult]) -> None:
        with self.lock:
            self.waiting.pop(future, None)
        try:
            response = success(future.result())
        except BaseException as error:
            response = failure(error)
        self._send(sender, response)

    def _send(self, sender: Any, response: Any) -> None:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _watch(self) -> None:
        """Cancels the requests of clients that have gone."""
        while not self.ended.wait(LOOK):
            with self.lock:
                gone = [future for future, sender in self.waiting.items() if has_gone(sender)]
            for future in gone:
                future.cancel()


def plain(name: str, value: Any) -> Any:
    """A value of an input, as JSON would have it."""
    if not isinstance(value, bytes):
        return value.item()
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{name} is no UTF-8: {error}") from error


def has_gone(sender: Any) -> bool:
    """Whether nobody waits for the answer, as far as one can tell."""
    try:
        return bool(sender.is_cancelled())
    except Exception:  # it is as good as gone, and others are looked after all the same
        logging.getLogger(__name__).exception("a request is cancelled: its sender does not answer")
        return True


def success(result: ImageResult) -> Any:
    """A response with the pictures, ``[n, height, width, 3]``, and what they cost."""
    images = np.stack([np.asarray(image.convert("RGB")) for image in result.images])
    said = np.array([json.dumps(result.statistics.as_dict()).encode()], dtype=np.object_)
    tensors = [pb_utils.Tensor("IMAGES", images), pb_utils.Tensor("STATISTICS", said)]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def failure(error: BaseException) -> Any:
    """A response that says what went wrong."""
    code = pb_utils.TritonError.INTERNAL
    if isinstance(error, BadRequest):
        code = pb_utils.TritonError.INVALID_ARG
    elif isinstance(error, Overloaded | ServiceClosed | ServiceDead):
        code = pb_utils.TritonError.UNAVAILABLE
    elif isinstance(error, CancelledError):
        code = pb_utils.TritonError.CANCELLED
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error) or repr(error), code))
