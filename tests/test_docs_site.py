"""The site: it builds without a warning, asks nobody for anything, and has every public name."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import sidestep
from sidestep import kernels

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As CONTRIBUTING builds it, elsewhere; a warning is an error."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (command,) = re.findall(r"^sphinx-build (.*) docs build/docs$", page, re.MULTILINE)
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *command.split(), "-q", "docs", str(out)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return out


def test_every_page_is_there(site: Path) -> None:
    pages = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    assert len(pages) > 20
    assert all((site / page).is_file() for page in pages)


@pytest.fixture(scope="module")
def known(site: Path) -> dict[str, str]:
    """By full name, where the reference has it."""
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, place: place)
    return {
        name: item.uri for kind, items in inventory.items() for name, item in items.items()
        if kind.startswith("py:")
    }  # fmt: skip


def test_every_public_name_is_in_the_reference(site: Path, known: dict[str, str]) -> None:
    wanted = {f"sidestep.{name}" for name in sidestep.__all__}
    wanted |= {f"sidestep.kernels.{name}" for name in kernels.__all__}
    missing = wanted - set(known) - {"sidestep.kernels.BackendUnavailable"}  # once is enough
    assert not missing
    for name in wanted & set(known):
        page, _, place = known[name].partition("#")
        assert f'id="{place.replace("$", name)}"' in (site / page).read_text()


def test_what_pages_import_is_in_the_reference(known: dict[str, str]) -> None:
    imports = set()
    for page in DOCS.glob("*.md"):
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sidestep"):
                    imports |= {(node.module, alias.name) for alias in node.names}
    assert len(imports) > 20
    modules = {("sidestep", "kernels"), ("sidestep.kernels", "reference")}
    missing = {pair for pair in imports - modules if ".".join(pair) not in known}
    assert not {pair for pair in missing if pair[1] not in sidestep.__all__}


def _public_parts(name: str, thing: object) -> dict[str, object]:
    """What is documented of a name: itself, and the methods and properties of its own class."""
    parts = {name: thing}
    if inspect.isclass(thing):
        for key, value in vars(thing).items():
            value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if not key.startswith("_") and (
                inspect.isfunction(value) or isinstance(value, property)
            ):
                parts[f"{name}.{key}"] = value
    return parts


@pytest.mark.parametrize("module", [sidestep, kernels], ids=["sidestep", "kernels"])
def test_every_public_name_says_what_it_is(module: object) -> None:
    for name in set(module.__all__) - {"__version__"}:
        for part, thing in _public_parts(name, getattr(module, name)).items():
            text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
            assert text and "." in text, part


def test_nothing_is_asked_of_the_network(site: Path) -> None:
    pages, styles = [*site.rglob("*.html")], [*site.rglob("*.css")]
    assert len(pages) > 40 and styles
    for page in pages:
        text = page.read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]* src=\"(?:https?:)?//[^>]*>", text), page
        assert not re.findall(r"<link[^>]* href=\"(?:https?:)?//[^>]*>", text), page
    for style in styles:
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text()), style


def test_docstrings_are_read_as_they_are_written(site: Path) -> None:
    """Formulae stay in lines of their own, and a property's colon is no type."""
    text = (site / "api" / "operators.html").read_text()
    assert re.search(r"<pre>.*u          = sum_g weights\[row, g\] \* outputs", text, re.DOTALL)
    extending = (site / "api" / "extending.html").read_text()
    assert "rises at every step: no step has a second stage" in re.sub(r"\s+", " ", extending)
