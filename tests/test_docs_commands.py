"""Every command that a page shows is one, with options that it has; every Python page is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from sidestep.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]


def _commands(page: Path) -> list[list[str]]:
    """Those in code blocks, and those between backticks in the text."""
    text = page.read_text()
    fenced = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [line.strip() for part in fenced.splitlines() for line in part.split("&&")]
    inline = [line.replace("\n", " ") for line in re.findall(r"`(sidestep [a-z][^`]*)`", text)]
    words = [shlex.split(line.split(" > ")[0]) for line in [*lines, *inline]]
    return [line[1:] for line in words if line and Path(line[0]).name == "sidestep"]


def _parse(words: list[str]) -> None:
    """Raises ValueError, or click's own error, for a command or an option that there is not."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command)
    while hasattr(command, "commands") and words:
        if words[0] not in command.commands:
            raise ValueError(f"no command {words[0]!r}")
        command, words = command.commands[words[0]], words[1:]
        context = command.context_class(command)
    command.make_parser(context).parse_args(list(words))


def test_commands_on_pages_are_commands() -> None:
    shown = {str(page.relative_to(ROOT)): _commands(page) for page in PAGES}
    assert sum(map(len, shown.values())) > 60
    assert len(shown["docs/operators.md"]) >= 8 and len(shown["README.md"]) > 15
    for page, commands in shown.items():
        for words in commands:
            try:
                _parse(words)
            except Exception as error:
                pytest.fail(f"{page}: sidestep {' '.join(words)}: {error}")


@pytest.mark.parametrize("line", ["compare --stepz 3", "bench nothing", "plan --method srds"])
def test_what_is_none_is_found(line: str) -> None:
    with pytest.raises(Exception, match=r"[Nn]o (such option|command)"):
        _parse(line.split())


def test_every_page_with_python_is_run() -> None:
    """By name, in one of the tests of the pages."""
    tests = "".join(path.read_text() for path in ROOT.glob("tests/**/test_docs*.py"))
    pages = {page.name for page in ROOT.glob("docs/*.md") if "```python" in page.read_text()}
    assert len(pages) > 10
    assert not {name for name in pages if f'"{name}"' not in tests}


def test_files_on_pages_are_there() -> None:
    """Paths between backticks, from the root or from a folder of the package."""
    folders = [ROOT, ROOT / "python/sidestep", ROOT / "csrc/include"]
    path_of = re.compile(r"`((?:\w[\w.-]*/)+\w[\w-]*\.(?:py|cpp|cuh?|h|sh|md|json))`")
    named = {(page.name, path) for page in PAGES for path in path_of.findall(page.read_text())}
    kept = {(page, path) for page, path in named if not re.search(r"(/|_)X\.", path)}  # any stem
    assert len(kept) > 60
    lost = {one for one in kept if not any((folder / one[1]).is_file() for folder in folders)}
    assert not lost
