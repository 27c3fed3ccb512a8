"""What the pages of docs/results are measured with: runs of the command line, two at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def measure(parts: Mapping[Path, Sequence[str]]) -> dict[str, Any]:
    """One document of several that differ in what they measured only.

    Two processes of one thread each share the parts; a part goes on where it was interrupted.

    Args:
        parts: By the picture that each writes beside its document: the options of ``sidestep``.
    """
    with ThreadPoolExecutor(2) as pool:
        first, *others = pool.map(_run, parts.items())
    for other in others:
        first["results"] += other["results"]
    return first


def _run(part: tuple[Path, Sequence[str]]) -> dict[str, Any]:
    picture, options = part
    picture.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sidestep", *options, "--out", str(picture)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
    document: dict[str, Any] = json.loads(picture.with_suffix(".json").read_text())
    return document
