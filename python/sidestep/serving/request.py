"""What a client asks of a service and gets from it, and what is refused with one sentence."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_LARGEST_SEED = 2**63 - 1
_SHOWN = 100  # characters of a value in a message


class BadRequest(ValueError):
    """The client asks for what cannot be; the message says what was expected and what came."""


class Overloaded(RuntimeError):
    """Too many requests wait; nothing was changed, and later there may be room."""


class ServiceClosed(RuntimeError):
    """The service takes no requests any more, or was closed before this one was done."""


class ServiceDead(RuntimeError):
    """The thread that makes the pictures has ended; only a new service helps."""


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Pictures of one prompt.

    Attributes:
        prompt: The text.
        negative_prompt: What guidance leads away from; None for nothing.
        steps: Of the scheduler.
        guidance: The scale s of ``u = u_0 + s (u_c - u_0)``; 1 or less calls one branch only, in
            pipelines that know of it.
        seed: Picture i starts from noise of a CPU generator seeded ``seed + i``.
        n: Pictures.
        size: ``(width, height)`` in pixels; None for the first of the service's.
        method: One of the service's by name; ``"none"`` calls the model at every step.
        solver: One of the service's schedulers by name; None for the pipeline's own.
    """

    prompt: str
    negative_prompt: str | None = None
    steps: int = 25
    guidance: float = 7.5
    seed: int = 0
    n: int = 1
    size: tuple[int, int] | None = None
    method: str = "none"
    solver: str | None = None

    @staticmethod
    def of(fields: Any) -> ImageRequest:
        """What a body of JSON asks for.

        Args:
            fields: By the names that SGLang has for them (``num_inference_steps``,
                ``guidance_scale``), the size as ``"64x64"``; what is None or left out is as
                above.

        Raises:
            BadRequest: It is no object, has no prompt, or a field that is not known.
        """
        if not isinstance(fields, Mapping):
            raise BadRequest(f"the body is a {type(fields).__name__}, expected an object")
        given = {str(name): value for name, value in fields.items() if value is not None}
        for name in given:
            if name not in _FIELDS:
                raise BadRequest(f"{_shown(name)} is unknown, expected {', '.join(_FIELDS)}")
        if "prompt" not in given:
            raise BadRequest("prompt is missing, expected text")
        if "size" in given:
            given["size"] = _parse_size(given["size"])
        return ImageRequest(**{_FIELDS[name]: value for name, value in given.items()})


_FIELDS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "seed": "seed",
    "n": "n",
    "size": "size",
    "method": "method",
    "solver": "solver",
}


def _parse_size(text: Any) -> tuple[int, int] | None:
    """Of ``"64x64"``; None for ``"auto"``."""
    if text == "auto":
        return None
    width, _, height = text.partition("x") if isinstance(text, str) else ("", "", "")
    if not all(side.isascii() and side.isdigit() and len(side) < 6 for side in (width, height)):
        raise BadRequest(f"size is {_shown(text)}, expected WIDTHxHEIGHT")
    return int(width), int(height)


def _shown(value: Any) -> str:
    """A client's value in a message: escaped, and not long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # too many digits, or nested too deeply
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for, at most.

    Attributes:
        steps: Steps of the scheduler.
        n: Pictures in one request.
        prompt: Characters of a prompt; the pipeline itself leaves out what its tokens do not hold.
        guidance: The scale.
        queue: Requests that wait or run at the same time.
    """

    steps: int = 150
    n: int = 4
    prompt: int = 2000
    guidance: float = 50.0
    queue: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 1:
                raise ValueError(f"Limits: {name} is {value}, expected 1 or more")

    def check(
        self,
        request: ImageRequest,
        sizes: Collection[tuple[int, int]],
        methods: Collection[str],
        solvers: Collection[str],
    ) -> None:
        """Refuses what the service does not make.

        Args:
            request: What is asked.
            sizes: ``(width, height)`` that there are.
            methods: By name.
            solvers: By name.

        Raises:
            BadRequest: One sentence that says what was expected and what came.
        """
        _check_text("prompt", request.prompt, self.prompt)
        if request.negative_prompt is not None:
            _check_text("negative_prompt", request.negative_prompt, self.prompt)
        _check_whole("steps", request.steps, 1, self.steps)
        _check_whole("n", request.n, 1, self.n)
        _check_whole("seed", request.seed, 0, _LARGEST_SEED - self.n)
        guidance = request.guidance
        number = isinstance(guidance, int | float) and not isinstance(guidance, bool)
        if not number or not (0 <= guidance <= self.guidance and math.isfinite(guidance)):
            raise BadRequest(f"guidance is {_shown(guidance)}, expected 0 to {self.guidance:g}")
        if request.size is not None and request.size not in sizes:
            known = ", ".join(f"{width}x{height}" for width, height in sizes)
            raise BadRequest(f"size is {_size(request.size)}, expected one of {known}")
        _check_name("method", request.method, methods)
        if request.solver is not None:
            _check_name("solver", request.solver, solvers)


def _check_text(name: str, value: Any, most: int) -> None:
    if not isinstance(value, str):
        raise BadRequest(f"{name} is a {type(value).__name__}, expected text")
    if len(value) > most:
        raise BadRequest(f"{name} has {len(value)} characters, expected at most {most}")
    if name == "prompt" and not value.strip():
        raise BadRequest("prompt is empty, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{name} has half a surrogate pair, expected text") from error


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadRequest(
            f"{name} is {_shown(value)}, expected a whole number from {least} to {most}"
        )


def _check_name(name: str, value: Any, known: Collection[str]) -> None:
    if not isinstance(value, str) or value not in known:
        names = ", ".join(known) or "none, as the service has only the pipeline's own"
        raise BadRequest(f"{name} is {_shown(value)}, expected one of {names}")


def _size(size: Any) -> str:
    try:
        width, height = size
    except (TypeError, ValueError):
        return _shown(size)
    return f"{width}x{height}"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the pictures of a request cost.

    Attributes:
        steps: Model calls of each picture without a method: steps of the plan.
        model_calls: ``[n]`` evaluations of the model; all guidance branches count as one.
        ticks: Calls of the model that rows of the request took part in, with those of others.
        queued_seconds: From `Service.submit` until the request had rows in the engine.
        running_seconds: From then until the pictures were there.
        method: The method's name.
        solver: Of the plan.
    """

    steps: int
    model_calls: tuple[float, ...]
    ticks: int
    queued_seconds: float
    running_seconds: float
    method: str
    solver: str

    @property
    def saved_calls(self) -> tuple[float, ...]:
        """``[n]`` evaluations fewer than steps; negative for SRDS, which makes more of them."""
        return tuple(self.steps - calls for calls in self.model_calls)

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        made = asdict(self) | {"model_calls": list(self.model_calls)}
        return made | {"saved_calls": list(self.saved_calls)}


@dataclass(frozen=True, eq=False)
class ImageResult:
    """The pictures of a request.

    Attributes:
        images: ``[n]``.
        latents: ``[n, ...]`` float32, what they were decoded from.
        statistics: What they cost.
    """

    images: list[Image]
    latents: Tensor
    statistics: Statistics

    def as_dict(self) -> dict[str, Any]:
        """``images``, each a PNG in base 64, and ``statistics``, as JSON has them."""
        return {"images": [_png(each) for each in self.images]} | {
            "statistics": self.statistics.as_dict()
        }


def _png(image: Image) -> str:
    held = io.BytesIO()
    image.save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


def http_status(error: BaseException) -> int:
    """What a server over HTTP answers to what a service raises."""
    if isinstance(error, BadRequest):
        return 400
    if isinstance(error, Overloaded):
        return 429
    return 503 if isinstance(error, ServiceClosed | ServiceDead) else 500
