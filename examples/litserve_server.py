"""A `sidestep.serving.Service` behind LitServe.

    python examples/litserve_server.py --model emoji-sd --port 8001
    curl 127.0.0.1:8001/predict -H 'content-type: application/json' -d '{"prompt": "frog"}'

`predict` is a coroutine, so that LitServe hands over a request as soon as it comes: they meet in
the engine, at any step, and LitServe's own batches are not needed.  LitServe's `/health` says that
its workers have begun, and no more; a client that goes away is not told to `predict`.  A body that
is no JSON is LitServe's to answer, and it says 500.
"""

from __future__ import annotations

import argparse
from typing import Any

import litserve
from fastapi import HTTPException

from sidestep.models import load_pipeline
from sidestep.serving import ImageRequest, ImageResult, Service, http_status


class Images(litserve.LitAPI):
    """Pictures of a model."""

    def __init__(self, model: str) -> None:
        super().__init__(enable_async=True)
        self.model = model

    def setup(self, device: str) -> None:
        """Once in each worker."""
        self.service = Service(load_pipeline(self.model, device=device, safety_checker=True))

    async def predict(self, body: dict[str, Any]) -> ImageResult:
        """Waits for the pictures of a body of JSON, while others wait for theirs."""
        try:
            return await self.service.generate(ImageRequest.of(body))
        except Exception as error:
            raise HTTPException(http_status(error), str(error) or repr(error)) from error

    async def encode_response(self, result: ImageResult) -> dict[str, Any]:
        """PNGs in base 64, and what they cost."""
        return result.as_dict()


def main() -> None:
    """Serves a model until SIGINT."""
    parser = argparse.ArgumentParser(description="Pictures through LitServe")
    parser.add_argument("--model", default="emoji-sd", help="bundled name or diffusers folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--port", type=int, default=8001)
    given = parser.parse_args()
    server = litserve.LitServer(Images(given.model), accelerator=given.device, timeout=600)
    server.run(host="127.0.0.1", port=given.port, generate_client_file=False)


if __name__ == "__main__":
    main()
