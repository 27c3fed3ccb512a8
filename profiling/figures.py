"""Checks that figures which a text quotes are those of docs/results.

    python profiling/figures.py         # exits 1 where a figure is another, or is not there

The paragraph above a comment such as

    <!-- figures: step.speedup_sd:.0f; 100 * step.bandwidth_fraction:.0f -->

holds these figures, in this order, among others.  An expression is of Python, over the documents by
their file names (a `-` in them is a `_`), and what follows its last colon is a format.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMENT = re.compile(r"<!-- figures: (.*?) -->", re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


class Record(dict[str, Any]):
    """A JSON object whose keys are attributes too."""

    __getattr__ = dict.__getitem__


def documents(root: Path) -> dict[str, Any]:
    """The documents of docs/results by name."""
    return {
        file.stem.replace("-", "_"): json.loads(file.read_text(), object_hook=Record)
        for file in sorted((root / "docs" / "results").glob("*.json"))
    }


def rendered(expression: str, known: dict[str, Any]) -> str:
    """One figure as it is printed."""
    code, _, form = expression.strip().rpartition(":")
    return format(eval(code, {"__builtins__": {}}, known), form)


def quotes(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every paragraph with a comment below it, and the expressions of that."""
    for comment in COMMENT.finditer(text):
        paragraph = text[: comment.start()].rstrip("\n").rpartition("\n\n")[2]
        yield paragraph, [part for part in comment[1].split(";") if part.strip()]


def wrong(page: Path, known: dict[str, Any]) -> Iterator[str]:
    """A sentence for each figure that its paragraph does not hold in its place."""
    for paragraph, expressions in quotes(page.read_text()):
        numbers = iter(NUMBER.findall(paragraph))
        for expression in expressions:
            figure = rendered(expression, known)
            if figure not in numbers:  # which goes on behind it
                yield f"{page.name}: expected {figure} ({expression.strip()}) in: {paragraph}"
                break


def main() -> None:
    """Checks the README and the pages under docs."""
    parser = argparse.ArgumentParser(description="Figures of the README and docs.")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the pages; default: this one")
    root = parser.parse_args().root
    known = documents(root)
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    found = [line for page in pages for line in wrong(page, known)]
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
