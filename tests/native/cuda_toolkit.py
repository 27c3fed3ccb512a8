"""Where the CUDA toolkit is."""

from __future__ import annotations

import os
from pathlib import Path


def toolkit() -> Path | None:
    """Finds the CUDA toolkit as csrc/cuda.cmake does."""
    places = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    for place in places:
        if place and (Path(place) / "include/cuda_runtime.h").exists():
            return Path(place)
    return None
