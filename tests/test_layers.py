"""The import directions of the design: sidestep -> runtime -> kernels -> _native, never upward."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "runtime": ("diffusers", "transformers", "triton", "sidestep.adapters", "sidestep.cli"),
    "triton_kernels": ("diffusers", "transformers", "sidestep.runtime"),
    "python/sidestep": ("triton",),
}
ALLOWED_SIDESTEP = {
    "runtime": ("sidestep.runtime", "sidestep.kernels"),
    "triton_kernels": ("sidestep.kernels", "sidestep._native"),
}


def _imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import of {node.module}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_imports_only_go_down(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file"
    for file in files:
        for name in _imports(file):
            for package in FORBIDDEN[folder]:
                assert not _within(name, package), f"{file} imports {name}"
            if folder in ALLOWED_SIDESTEP and _within(name, "sidestep"):
                allowed = ALLOWED_SIDESTEP[folder]
                assert any(_within(name, package) for package in allowed), f"{file}: {name}"


KNOW_DIFFUSERS = {"adapters", "bench", "models", "training", "report/environment.py"}
"""Its adapters; what measures it, loads it and trains with it; and what prints its version."""


def test_diffusers_is_known_to_few() -> None:
    root = ROOT / "python/sidestep"
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if path.parts[0] not in KNOW_DIFFUSERS and str(path) not in KNOW_DIFFUSERS:
            assert not any(_within(n, "diffusers") for n in _imports(file)), file


def test_the_command_line_is_the_top() -> None:
    root = ROOT / "python/sidestep"
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] not in ("cli", "__main__.py"):
            assert not any(_within(n, "sidestep.cli") for n in _imports(file)), file


def test_folder_names_are_not_importable(tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec\n"
        "print([find_spec(n) for n in ('triton_kernels', 'runtime', 'tests', 'csrc')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[None, None, None, None]"


def test_every_file_says_what_it_is_for() -> None:
    for folder in ("runtime", "triton_kernels", "python/sidestep", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            text = file.read_text()
            assert not text.strip() or ast.get_docstring(ast.parse(text)), file
