"""An OpenAI-style images endpoint over a `sidestep.serving.Service`, with FastAPI.

    python examples/openai_images.py --model emoji-sd --port 8000

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    made = client.images.generate(
        model="emoji-sd", prompt="frog on a bicycle", size="64x64",
        extra_body={"num_inference_steps": 25, "seed": 1, "method": "adaptive"},
    )
    made.data[0].b64_json, made.statistics["saved_calls"]

Fields beyond OpenAI's have SGLang's names (num_inference_steps, guidance_scale, seed,
negative_prompt); `method` and `solver` are ours.  `/health` says whether pictures are being made,
`/metrics` what the service has counted.  SIGTERM: what was asked is finished, nothing new begins.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidestep.models import load_pipeline
from sidestep.serving import ImageRequest, ImageResult, Service, http_status

BODY = 1 << 20  # bytes of a request
GONE = 499  # the client has closed the connection; nobody reads it
NOW = ("waiting", "running")  # of `Service.counts`; the others only grow


class Ask(BaseModel):
    """The body of a request; a field that is not here is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    n: int = 1
    size: str | None = None
    response_format: Literal["b64_json"] = "b64_json"
    user: str | None = None
    negative_prompt: str | None = None
    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 0
    method: str = "none"
    solver: str | None = None

    def request(self) -> ImageRequest:
        """What the service is asked.

        Raises:
            BadRequest: The size is none.
        """
        return ImageRequest.of(self.model_dump(exclude={"model", "response_format", "user"}))


class Counts(Collector):
    """The service's own numbers, read when somebody asks."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """One metric for each number."""
        yield GaugeMetricFamily("sidestep_up", "pictures are made", self.service.state == "ok")
        for name, value in self.service.counts().items():
            if name in NOW:
                yield GaugeMetricFamily(f"sidestep_{name}", f"requests {name}", value)
            elif name == "saved":  # SRDS makes more calls than it saves
                yield GaugeMetricFamily("sidestep_saved", "evaluations saved", value)
            else:
                yield CounterMetricFamily(f"sidestep_{name}", f"{name} so far", value)


def error(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    """An error as OpenAI's clients expect it; what of a client's text is no Unicode, escaped."""
    message = message.encode(errors="backslashreplace").decode()
    body = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=status)


async def unless_gone(http: Request, service: Service, request: ImageRequest) -> ImageResult | None:
    """The result; None when the client has gone, and then the request is cancelled."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    making, leaving = asyncio.create_task(service.generate(request)), asyncio.create_task(gone())
    try:
        await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await making if making.done() else None
    finally:
        making.cancel()
        leaving.cancel()


class Edge:
    """Counts answers, and refuses bodies that no request needs."""

    def __init__(self, app: ASGIApp, answered: Counter) -> None:
        self.app, self.answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered.labels(str(message["status"])).inc()
            await send(message)

        length = dict(scope["headers"]).get(b"content-length", b"none")
        if scope["method"] == "POST" and not (length.isdigit() and int(length) <= BODY):
            said = f"content-length is {length.decode('latin-1')}, expected at most {BODY}"
            return await error(413, said)(scope, receive, told)
        await self.app(scope, receive, told)


async def answer(service: Service, ask: Ask, http: Request) -> Response:
    """The pictures that were asked for, or why there are none."""
    try:
        result = await unless_gone(http, service, ask.request())
        made = None if result is None else await asyncio.to_thread(result.as_dict)
    except Exception as failure:
        status = http_status(failure)
        kind = "invalid_request_error" if status < 500 else "server_error"
        return error(status, str(failure) or repr(failure), kind)
    if made is None:
        return Response(status_code=GONE)
    data = [{"b64_json": picture} for picture in made["images"]]
    body = {"created": int(time.time()), "data": data, "statistics": made["statistics"]}
    return JSONResponse(body)


def create_app(service: Service, model: str) -> FastAPI:
    """The application over a service, which it closes at its end."""

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app, registry = FastAPI(lifespan=life, openapi_url=None), CollectorRegistry()
    registry.register(Counts(service))
    app.add_middleware(
        Edge,
        answered=Counter("sidestep_http", "answers by status", ["status"], registry=registry),
    )

    @app.post("/v1/images/generations")
    async def generate(ask: Ask, http: Request) -> Response:
        if ask.model not in (None, model):
            return error(404, f"model is {ask.model!r}, expected {model!r}")
        return await answer(service, ask, http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        known = {"id": model, "object": "model", "created": 0, "owned_by": "sidestep"}
        return {"object": "list", "data": [known]}

    @app.get("/health")
    async def health() -> JSONResponse:
        state = service.state
        return JSONResponse({"status": state}, status_code=200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestValidationError)
    async def refuse(_http: Request, refused: RequestValidationError) -> JSONResponse:
        first = refused.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return error(400, f"{where}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def unknown(_http: Request, refused: HTTPException) -> JSONResponse:
        return error(refused.status_code, str(refused.detail))

    return app


def main() -> None:
    """Serves a model until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="OpenAI-style images endpoint")
    parser.add_argument("--model", default="emoji-sd", help="bundled name or diffusers folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--capacity", type=int, default=32, help="pictures in flight")
    given = parser.parse_args()
    pipe = load_pipeline(given.model, device=given.device, safety_checker=True)
    service = Service(pipe, capacity=given.capacity)
    uvicorn.run(create_app(service, given.model), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
