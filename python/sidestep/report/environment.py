"""What the numbers were measured on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions and hardware.

    Args:
        device: Where the model ran, ``cpu`` or ``cuda...``.
    """
    import diffusers
    import torch

    from sidestep import __version__

    try:
        from sidestep import _native

        simd = _native.simd()
    except ImportError:
        simd = "native library missing"

    return {
        "sidestep": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "simd": simd,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
