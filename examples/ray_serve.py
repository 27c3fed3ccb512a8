"""A `sidestep.serving.Service` in each replica of a Ray Serve deployment.

    python examples/ray_serve.py --model emoji-sd --replicas 2 --port 8002
    curl 127.0.0.1:8002 -d '{"prompt": "frog", "num_inference_steps": 25}'

Ray chooses the replica; there the requests share model calls.  It cancels the coroutine of a client
that has gone, and that frees the rows.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from sidestep.models import load_pipeline
from sidestep.serving import ImageRequest, Service, http_status

BODY = 1 << 20  # bytes of a request
TOGETHER = 64  # requests in a replica; Ray's default would keep all but five waiting outside


@serve.deployment(max_ongoing_requests=TOGETHER, health_check_period_s=2)
class Images:
    """Pictures of a model."""

    def __init__(self, model: str, device: str) -> None:
        self.service = Service(load_pipeline(model, device=device, safety_checker=True))
        self.name = serve.get_replica_context().replica_id.unique_id

    async def __call__(self, http: Request) -> JSONResponse:
        """One request over HTTP."""
        body = await http.body()
        if len(body) > BODY:
            said = f"the body has {len(body)} bytes, expected at most {BODY}"
            return JSONResponse({"error": said}, 413)
        try:
            asked = json.loads(body or b"null")
        except (ValueError, RecursionError) as error:
            return JSONResponse({"error": f"the body is no JSON: {error}"}, 400)
        try:
            result = await self.service.generate(ImageRequest.of(asked))
        except Exception as error:
            return JSONResponse({"error": str(error) or repr(error)}, http_status(error))
        return JSONResponse(result.as_dict() | {"replica": self.name})

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if self.service.state == "dead":
            raise RuntimeError(f"the service has died: {self.service.error!r}")

    def __del__(self) -> None:
        """Ray lets go of a replica when its requests have ended."""
        if hasattr(self, "service"):
            self.service.close()


def main() -> None:
    """Serves a model until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="Pictures through Ray Serve")
    parser.add_argument("--model", default="emoji-sd", help="bundled name or diffusers folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1, help="of a replica")
    parser.add_argument("--port", type=int, default=8002)
    given = parser.parse_args()
    ray.init(num_cpus=max(1, round(given.replicas * given.cpus)), include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    resources = {"num_cpus": given.cpus, "num_gpus": int(given.device.startswith("cuda"))}
    deployment = Images.options(num_replicas=given.replicas, ray_actor_options=resources)
    serve.run(deployment.bind(given.model, given.device))
    print(f"serving on http://127.0.0.1:{given.port}", flush=True)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
