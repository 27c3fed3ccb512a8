"""Captures one real model call of a generation into a file, and makes it again.

    python profiling/replay.py capture call.safetensors --steps 10 --step 3
    python profiling/replay.py run call.safetensors --repeats 20 --picture replay.png

The file holds every tensor of the call's arguments and of its output, and beside them the structure
of the arguments and which model it was. `run` says whether the output is the same, and how long a
call takes; on a GPU the repeats are between cudaProfilerStart and Stop, for Nsight.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sidestep.errors import UserError
from sidestep.models import load_pipeline, load_prompts
from sidestep.report.pictures import BLUE, ORANGE, check_writable, save_figure
from sidestep.runtime.files import write_whole

WARM_UP = 3
NETWORKS = ("unet", "transformer")


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A value as JSON, its tensors put aside by name.

    Raises:
        UserError: Something in it cannot be written down.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": {key: pack(item, tensors, f"{name}.{key}") for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise UserError(f"{name} is a {type(value).__name__}, which a file of tensors cannot hold")


def unpack(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [unpack(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content


def network_of(pipe: Any) -> tuple[str, Any]:
    """The pipeline's network, by its name there."""
    for name in NETWORKS:
        if (network := getattr(pipe, name, None)) is not None:
            return name, network
    raise UserError(f"--model: the pipeline has none of {', '.join(NETWORKS)}")


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a model returned."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def capture(path: Path, model: str, steps: int, step: int, device: str, dtype: str) -> None:
    """Writes the model call of one step of a plain generation.

    Raises:
        UserError: There is no such step, or the call cannot be written down.
    """
    if not 0 <= step < steps:
        raise UserError(f"--step: got {step}, expected 0 to {steps - 1}")
    pipe = load_pipeline(model, getattr(torch, dtype), device)
    name, network = network_of(pipe)
    tensors: dict[str, Tensor] = {}
    told = {"model": model, "network": name, "dtype": dtype, "step": step, "steps": steps}
    turns = itertools.count()

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        if next(turns) == step:  # at once: the host may write into what it gave
            told["args"] = pack(args, tensors, "args")
            told["kwargs"] = pack(kwargs, tensors, "kwargs")
            tensors["output"] = first_tensor(output).detach().cpu().contiguous()

    hook = network.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            pipe(
                load_prompts("novel")[0], num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0), output_type="latent",
            )  # fmt: skip
    finally:
        hook.remove()
    write_whole(path, save(tensors, {"call": json.dumps(told)}))
    print(f"{path}: {name} of {model}, step {step} of {steps}, {len(tensors)} tensors")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The call, and its tensors.

    Raises:
        UserError: It is no file of `capture`.
    """
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get("call", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if told is None:
        raise UserError(f"{path}: holds no call, expected a file of `replay.py capture`")
    return told, tensors


def draw(seconds: Sequence[float], title: str, out: Path) -> None:
    """Every repeat's time in order, and the median: a drift or an outlier is seen at once."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 2.4), layout="constrained")
    axis.plot(range(1, len(seconds) + 1), [1000 * s for s in seconds], "o", color=BLUE)
    median = 1000 * statistics.median(seconds)
    axis.axhline(median, color=ORANGE, label=f"median {median:.2f} ms")
    axis.set(title=title, xlabel="call", ylabel="ms", ylim=(0, 1100 * max(seconds)))
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    axis.title.set_fontsize(9)
    save_figure(figure, out)


def run(path: Path, repeats: int, device: str, picture: Path | None) -> None:
    """Makes the call again.

    Raises:
        UserError: The file holds no call, or the picture cannot be written.
    """
    if repeats < 1:
        raise UserError(f"--repeats: got {repeats}, expected 1 or more")
    if picture is not None:
        check_writable(picture)
    told, tensors = read(path)
    pipe = load_pipeline(told["model"], getattr(torch, told["dtype"]), device)
    network, cuda = getattr(pipe, told["network"]), pipe.device.type == "cuda"
    there = {name: tensor.to(pipe.device) for name, tensor in tensors.items()}
    args, kwargs = unpack(told["args"], there), unpack(told["kwargs"], there)

    def call() -> Tensor:
        output = first_tensor(network(*args, **kwargs))
        if cuda:
            torch.cuda.synchronize()
        return output

    with torch.no_grad():
        for _ in range(WARM_UP):
            output = call()
        if cuda:
            torch.cuda.profiler.start()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            output = call()
            seconds.append(time.perf_counter() - start)
        if cuda:
            torch.cuda.profiler.stop()
    difference = (output.float() - there["output"].float()).abs().max().item()
    same = "the same bits" if torch.equal(output, there["output"]) else f"within {difference:.2e}"
    what = f"{told['network']} of {told['model']} on {pipe.device}, step {told['step']}"
    if picture is not None:
        draw(seconds, what, picture)
    print(
        f"{what}: {same}; "
        f"{1000 * statistics.median(seconds):.2f} ms a call, the median of {repeats}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="One real model call, captured and replayed.")
    commands = parser.add_subparsers(dest="command", required=True)
    capturing = commands.add_parser("capture", help="write the call of one step")
    running = commands.add_parser("run", help="make it again")
    for one in (capturing, running):
        one.add_argument("file", type=Path)
        one.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    capturing.add_argument("--model", default="emoji-sd", help="or a local diffusers folder")
    capturing.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    capturing.add_argument("--steps", type=int, default=10)
    capturing.add_argument("--step", type=int, default=0)
    running.add_argument("--repeats", type=int, default=10)
    running.add_argument("--picture", type=Path, help="every call's time (PNG)")
    o = parser.parse_args(arguments)
    try:
        if o.command == "capture":
            capture(o.file, o.model, o.steps, o.step, o.device, o.dtype)
        else:
            run(o.file, o.repeats, o.device, o.picture)
    except UserError as error:
        sys.stderr.write(f"replay: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
