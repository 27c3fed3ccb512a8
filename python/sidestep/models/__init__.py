"""The models that ship with the package, its prompts, and loading a pipeline by name or folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from sidestep.errors import UserError

if TYPE_CHECKING:
    import torch

_FOLDER = Path(__file__).parent
BUNDLED = {name: _FOLDER / name for name in ("emoji-sd", "emoji-dit")}
_LOADING = (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError)
"""What diffusers raises for missing files, wrong configs and weights of another size."""

PROMPT_SETS = {
    "novel": _FOLDER / "emoji-sd" / "compositions.txt",
    "trained": _FOLDER / "emoji-sd" / "captions.txt",
}


def load_pipeline(
    model: str,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    *,
    safety_checker: bool = False,
) -> Any:
    """Loads a pipeline from a bundled name or a local diffusers folder; never downloads.

    Weights are read from safetensors only, never unpickled.

    Args:
        safety_checker: Whether the folder's is kept, if it has one; programs that serve keep it.

    Raises:
        UserError: There is no such bundled model or folder, or diffusers cannot load it.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    folder = BUNDLED.get(model, Path(model))
    if not (folder / "model_index.json").is_file():
        names = ", ".join(sorted(BUNDLED))
        raise UserError(
            f"--model: {model!r} is neither a bundled model ({names}) nor a diffusers folder "
            "with a model_index.json"
        )
    logging.getLogger("diffusers.pipelines.pipeline_loading_utils").setLevel(logging.CRITICAL)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    drops = not safety_checker and "safety_checker" in _components(folder)
    settings = {"safety_checker": None} if drops else {}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, **settings
        )
    except _LOADING as error:
        raise UserError(f"--model: diffusers cannot load {folder}: {error!r}") from error
    if dtype is not None:
        pipe.to(dtype=dtype)
    pipe.to(_device(device))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exits_of(model: str) -> Path | None:
    """The exits file in a model's folder, where `EarlyExit` finds what it was trained for."""
    path = BUNDLED.get(model, Path(model)) / "exits.safetensors"
    return path if path.is_file() else None


def _device(name: str) -> str:
    """``cpu`` or ``cuda`` for ``auto`` and for names torch knows.

    Raises:
        UserError: A GPU was asked for and torch sees none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device: got {name}, expected cpu, as torch sees no GPU")
    return name


def _components(folder: Path) -> str:
    return (folder / "model_index.json").read_text()


def load_prompts(source: str) -> list[str]:
    """Prompts, one a line, from a file or from a bundled set (``novel``, ``trained``).

    ``novel`` are the 64 prompts the bundled models never saw, on which claims are made; of the
    trained captions 64 are taken, evenly spaced.

    Raises:
        UserError: No such file, or it holds no prompt.
    """
    path = PROMPT_SETS.get(source, Path(source))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(PROMPT_SETS)
        raise UserError(
            f"--prompts: cannot read {source!r} as a text file, nor is it one of {names}"
        ) from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"--prompts: {source} holds no prompt, expected one a line")
    return spaced(prompts, 64) if source == "trained" else prompts


def spaced(texts: list[str], count: int) -> list[str]:
    """``count`` of the texts, evenly spaced; all of them if there are not as many."""
    return texts[:: max(1, len(texts) // count)][:count]
