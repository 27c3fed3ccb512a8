"""What a text pipeline has to be called with to make pictures of the size it was trained on."""

from __future__ import annotations

import inspect
from typing import Any


def own_size(pipe: Any) -> dict[str, Any]:
    """Arguments of ``pipe(...)`` besides prompt, steps, guidance and generator; mostly none.

    PixArt's pipelines round sizes to a list that small models are below, ask for more tokens than
    a small text encoder takes, and clean captions with a package that need not be there.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    settings: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
    length = getattr(getattr(pipe, "tokenizer", None), "model_max_length", None)
    given = known.get("max_sequence_length")
    single = not hasattr(pipe, "tokenizer_2")  # else the length is that of another one
    if single and given is not None and length is not None and isinstance(given.default, int):
        settings["max_sequence_length"] = min(given.default, length)
    return {name: value for name, value in settings.items() if name in known}
