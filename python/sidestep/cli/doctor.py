"""``sidestep doctor``: what was built, what was found, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import torch

from sidestep.cli import common


def doctor(as_json: common.Json = False) -> None:
    """Says what was built, what was found, what is missing and how to get it."""
    findings = _findings()
    if as_json:
        common.print_json(
            {"command": "doctor", "environment": common.environment(), "results": findings}
        )
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
    from sidestep import _native
    from sidestep.kernels import config
    from sidestep.models import BUNDLED

    info = _native.build_info()
    cuda_built = info["cuda"].startswith("yes")
    gpu = torch.cuda.is_available()
    triton = importlib.util.find_spec("triton") is not None
    findings = [
        _finding("native library", True, f"{info['compiler']}, {_native.simd()}, "
                 f"{_native.num_threads()} threads"),
        _finding("CUDA kernels", cuda_built, info["cuda"],
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


def _finding(part: str, ok: bool, found: str, fix: str = "") -> dict[str, Any]:
    return {"part": part, "ok": ok, "found": found, "fix": "" if ok else fix}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"
