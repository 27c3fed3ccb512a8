"""Serving: one pipeline, one engine, the requests of many clients.

    from sidestep.serving import ImageRequest, Service

    with Service(pipe) as service:
        future = service.submit(ImageRequest(prompt="frog on a bicycle", steps=25))
        picture = future.result().images[0]

What the programs under `examples/` share, whatever speaks to their clients.  See docs/serving.md.
"""

from __future__ import annotations

from sidestep.serving.request import (
    BadRequest,
    ImageRequest,
    ImageResult,
    Limits,
    Overloaded,
    ServiceClosed,
    ServiceDead,
    Statistics,
    http_status,
)
from sidestep.serving.service import Service

__all__ = [
    "BadRequest",
    "ImageRequest",
    "ImageResult",
    "Limits",
    "Overloaded",
    "Service",
    "ServiceClosed",
    "ServiceDead",
    "Statistics",
    "http_status",
]
