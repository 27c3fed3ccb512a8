"""What the scripts that make the pages of docs/results share.

    python profiling/NAME.py                # measures, and writes NAME.json, .md and the charts
    python profiling/NAME.py --quick        # less of it
    python profiling/NAME.py --out DIR      # somewhere else than in docs/results
    python profiling/NAME.py --reuse        # only the page and the charts, from the JSON
    python profiling/NAME.py --check        # exits 1 where a page does not say what the JSON says

A table that another page shows as well stands there between the two lines of `MARKS`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.runtime.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
MARKS = "<!-- made by profiling/{name}.py -->\n", "<!-- made until here -->\n"


@dataclass(frozen=True)
class Page:
    """One page of docs/results.

    Attributes:
        name: Its file without an ending; so is the document's.
        script: The file in profiling that makes it, without an ending.
        measure: Leaves the document in a folder; the flag asks for less of it.
        text: What the page says of a document.
        draw: Leaves the charts of a document in a folder.
        tables: By path from the root, a table of the document that another page shows.
    """

    name: str
    script: str
    measure: Callable[[Path, bool], None]
    text: Callable[[Any], str]
    draw: Callable[[Any, Path], None]
    tables: Mapping[str, Callable[[Any], Sequence[str]]] = field(default_factory=dict)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every such script."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="measure less of it")
    made.add_argument("--out", type=Path, default=RESULTS, help="default: docs/results")
    made.add_argument("--reuse", action="store_true", help="from the JSON that is there")
    made.add_argument("--check", action="store_true", help="compare instead of writing")
    made.add_argument("--root", type=Path, default=ROOT, help="of the pages; default: this one")
    return made


def make(page: Page, options: argparse.Namespace) -> None:
    """Does what the options say; exits 1 where a check finds a difference."""
    saved = options.out / f"{page.name}.json"
    if options.check:
        wrong = differences(page, options.root)
        sys.stdout.writelines(f"{line}\n" for line in wrong)
        sys.exit(1 if wrong else 0)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.reuse:
        page.measure(options.out, options.quick)
    document = json.loads(saved.read_text())
    page.draw(document, options.out)
    write_whole(saved.with_suffix(".md"), page.text(document).encode())
    if options.out.resolve() == RESULTS:
        for path, text in _tables(page, document, options.root).items():
            write_whole(path, text.encode())


def differences(page: Page, root: Path) -> list[str]:
    """Where pages say something else than the document, as lines of a diff."""
    results = root / RESULTS.relative_to(ROOT)
    document = json.loads((results / f"{page.name}.json").read_text())
    wanted = {results / f"{page.name}.md": page.text(document), **_tables(page, document, root)}
    lines: list[str] = []
    for path, text in wanted.items():
        name = str(path.relative_to(root))
        pages = path.read_text().splitlines(), text.splitlines()
        lines += difflib.unified_diff(*pages, name, f"made from {page.name}.json", lineterm="", n=0)
    return lines


def _tables(page: Page, document: Any, root: Path) -> dict[Path, str]:
    """The other pages, with this page's table in them.

    Raises:
        ValueError: One of them has no place for it.
    """
    found = {}
    begin, end = (mark.format(name=page.script) for mark in MARKS)
    for name, table in page.tables.items():
        text = (root / name).read_text()
        before, opened, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise ValueError(f"{name}: expected the lines {begin.strip()} and {end.strip()}")
        found[root / name] = "".join([before, begin, "\n".join([*table(document), ""]), end, after])
    return found
