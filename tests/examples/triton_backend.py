"""What Triton Inference Server gives a Python model, as far as a decoupled one uses it.

Stands in for `triton_python_backend_utils`, which exists within the server only.  It is as strict:
names, types and shapes are those of `config.pbtxt`, and a response after the last is an error.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from serving_process import PATIENCE

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
DTYPES = {
    "TYPE_STRING": np.object_, "TYPE_INT32": np.int32, "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32, "TYPE_UINT8": np.uint8,
}  # fmt: skip


class TritonError(Exception):
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = 1, 3, 4, 7

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self.message, self.code = message, code


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        assert isinstance(name, str) and isinstance(values, np.ndarray)
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


@dataclass
class Sender:
    """Of one request."""

    config: dict[str, Any]
    cancelled: bool = False
    response: InferenceResponse | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self.done.is_set(), "a response after the last one"
        if response.error is None:
            expected = {tensor["name"]: tensor for tensor in self.config["output"]}
            assert [tensor.name() for tensor in response.output_tensors] == list(expected)
            for tensor in response.output_tensors:
                _check(tensor, expected[tensor.name()])
        self.response = response
        if flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.done.set()

    def outputs(self) -> dict[str, np.ndarray]:
        """What was sent, once it was."""
        assert self.done.wait(PATIENCE) and self.response is not None
        assert self.response.error is None, self.response.error
        return {tensor.name(): tensor.as_numpy() for tensor in self.response.output_tensors}

    def error(self) -> TritonError:
        """That was sent, once it was."""
        assert self.done.wait(PATIENCE) and self.response is not None and self.response.error
        return self.response.error


class Request:
    """One that the server has checked against the model's inputs."""

    def __init__(self, config: dict[str, Any], inputs: dict[str, Any]) -> None:
        known = {tensor["name"]: tensor for tensor in config["input"]}
        self.tensors = {
            name: Tensor(name, np.array(value, dtype=DTYPES[known[name]["data_type"]]))
            for name, value in inputs.items()
        }
        for name, tensor in self.tensors.items():
            _check(tensor, known[name])
        missing = [n for n in known if n not in inputs and not known[n].get("optional")]
        assert not missing, missing
        self.sender = Sender(config)

    def get_response_sender(self) -> Sender:
        return self.sender


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return request.tensors.get(name)


def _check(tensor: Tensor, expected: dict[str, Any]) -> None:
    values = tensor.as_numpy()
    assert values.dtype == DTYPES[expected["data_type"]], tensor.name()
    assert len(values.shape) == len(expected["dims"]), tensor.name()
    for size, dim in zip(values.shape, expected["dims"], strict=True):
        assert dim in (-1, size), tensor.name()


def read_config(path: Path) -> dict[str, Any]:
    """A `config.pbtxt` as the server tells a model of it in `model_config`."""
    text = re.sub(r"#.*", "", path.read_text())
    tokens = re.findall(r'"[^"]*"|[\w.-]+|[][{}:,]', text)

    def value() -> Any:
        token = tokens.pop(0)
        if token == "{":
            return message("}")
        if token == "[":
            items = []
            while tokens[0] != "]":
                items.append(value())
                if tokens[0] == ",":
                    tokens.pop(0)
            tokens.pop(0)
            return items
        return _plain(token)

    def message(end: str) -> dict[str, Any]:
        made: dict[str, Any] = {}
        while tokens and tokens[0] != end:
            name = tokens.pop(0)
            if tokens[0] == ":":
                tokens.pop(0)
            got = value()
            if name == "parameters":  # a map
                made.setdefault(name, {})[got["key"]] = got["value"]
            else:
                made[name] = got
        if end:
            tokens.pop(0)
        return made

    return message("")


def _plain(token: str) -> Any:
    try:
        return json.loads(token)
    except ValueError:
        return token  # an enumeration
