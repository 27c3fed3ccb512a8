"""``sidestep doctor``: what was built, what was found, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch

from sidestep.cli import common
from sidestep.report.environment import environment


def doctor(as_json: common.Json = False) -> None:
    """Says what was built, what was found, what is missing and how to get it."""
    findings = _findings()
    if as_json:
        common.print_json({"command": "doctor", "environment": environment(), "results": findings})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("part", "state", "found", "what to do"):
        table.add_column(column)
    for f in findings:
        colour = "green" if f["ok"] else "yellow"
        state = f"[{colour}]{'ok' if f['ok'] else 'missing'}[/{colour}]"
        table.add_row(f["part"], state, f["found"], f["fix"])
    Console().print(table)


def _findings() -> list[dict[str, Any]]:
    from sidestep.kernels import config
    from sidestep.models import BUNDLED

    native, cuda = _native_library()
    gpu = torch.cuda.is_available()
    triton = importlib.util.find_spec("triton") is not None
    findings = [
        native,
        _finding("CUDA kernels", cuda.startswith("yes"), cuda,
                 "install a CUDA toolkit, then SIDESTEP_CUDA=1 pip install -e ."),
        _finding("GPU", gpu, torch.cuda.get_device_name() if gpu else "none seen by torch",
                 "everything runs on the CPU without one"),
        _finding("Triton", triton, _version("triton"), "pip install triton (Linux)"),
        _finding("kernels", True, f"SIDESTEP_KERNELS={config.backend()}"),
    ]  # fmt: skip
    for package in ("torch", "diffusers", "transformers", "accelerate", "safetensors"):
        version = _version(package)
        findings.append(_finding(package, version != "-", version, f"pip install {package}"))
    for name, folder in BUNDLED.items():
        there = (folder / "model_index.json").is_file()
        findings.append(_finding(f"model {name}", there, str(folder), "reinstall sidestep"))
    return findings


def _native_library() -> tuple[dict[str, Any], str]:
    """The finding about the extension, and what it says of CUDA."""
    try:
        from sidestep import _native
    except ImportError as error:
        return _finding("native library", False, str(error), "pip install -e ."), "not built"
    info = _native.build_info()
    found = f"{info['compiler']}, {_native.simd()}, {_native.num_threads()} threads"
    return _finding("native library", True, found), info["cuda"]


def _finding(part: str, ok: bool, found: str, fix: str = "") -> dict[str, Any]:
    return {"part": part, "ok": ok, "found": found, "fix": "" if ok else fix}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"
