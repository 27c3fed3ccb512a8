"""The error of this layer: what the machine or this build lacks."""

from __future__ import annotations


class BackendUnavailable(RuntimeError):
    """The chosen backend cannot run here; the message says what is missing and how to get it."""
