"""The JSON document of a long benchmark: kept up to date, continued by a later run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.report.environment import environment
from sidestep.runtime.files import write_whole


def open_document(common: Mapping[str, Any], state: Path) -> dict[str, Any]:
    """The document at ``state`` to continue, or a new one.

    Args:
        common: What all results of one document have in common.
        state: The file.

    Raises:
        UserError: ``state`` was made with other settings, or is something else.
    """
    if not state.exists():
        return {**common, "environment": environment(), "results": []}
    try:
        document = json.loads(state.read_text())
    except ValueError as error:
        raise UserError(f"--out: {state} is no JSON document to continue: {error}") from error
    for key, value in common.items():
        if document.get(key) != value:
            raise UserError(
                f"--out: {state} was made with another {key}, expected the same, or another --out"
            )
    return {**document, "environment": environment()}


def write(document: Mapping[str, Any], path: Path) -> None:
    """Writes the document, one result a line, whole or not at all."""
    head = {key: value for key, value in document.items() if key != "results"}
    results = ",\n".join(json.dumps(result) for result in document["results"])
    text = f'{json.dumps(head, indent=1)[:-2]},\n "results": [\n{results}\n]}}\n'
    write_whole(path, text.encode())
