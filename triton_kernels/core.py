"""The parts of the native library that hold numbers only: the row scheduler of the engine."""

from __future__ import annotations

from sidestep.kernels.errors import BackendUnavailable

try:
    from sidestep._native import QueueFull, RowScheduler
except ImportError as error:
    raise BackendUnavailable(
        f"engine: the native library is not built ({error}); run `pip install -e .`"
    ) from error

__all__ = ["QueueFull", "RowScheduler"]
