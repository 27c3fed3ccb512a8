"""The C++ example server, built against an installed libsidestep, makes the pictures of Python."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
from pathlib import Path

import capi
import numpy as np
import pytest
import torch
from torch import Tensor

from sidestep import Engine, Plan, Request
from sidestep.models import load_pipeline

EXAMPLE = capi.ROOT / "examples/cpp"
SHAPE, TEXT = (4, 16, 16), (24, 192)
PROMPTS = {"frog": 7.5, "owl": 5.0, "cat": 1.0}
# Relative to the largest number of a latent. ONNX Runtime and torch add the products of a
# convolution in other orders: they differ by 5e-7 of the largest output in one call, guidance
# multiplies that, and every step passes it on. Measured: 3e-7 at scale 1, 2e-6 at 5, 1e-5 at 7.5.
ONNX_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def example(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's build folder, which has found the library by find_package."""
    folder = tmp_path_factory.mktemp("example")
    ninja = f"-DCMAKE_MAKE_PROGRAM={capi.tool('ninja')}"
    at = f"-DCMAKE_PREFIX_PATH={installed}"
    capi.run(capi.tool("cmake"), "-S", EXAMPLE, "-B", folder, "-G", "Ninja", ninja, at)
    capi.run(capi.tool("cmake"), "--build", folder)
    return folder


def analytic(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The formula of examples/cpp/model.cpp."""
    offset = torch.tensor(0.001) * t + text[:, 0, 0]
    return 0.5 * x + offset[:, None, None, None]


def test_an_installed_library_has_all_headers(installed: Path) -> None:
    names = {path.name for path in (installed / "include/sidestep").iterdir()}
    assert names == {path.name for path in (capi.ROOT / "csrc/include/sidestep").iterdir()}


class Requests:
    """Requests in a folder, as the server reads them, and for the Python engine."""

    def __init__(self, folder: Path, texts: dict[str, Tensor]) -> None:
        """Writes noise, prompts, a plan for each, and requests.txt."""
        self.folder, self.requests = folder, {}
        pipe, lines = load_pipeline("emoji-sd"), []
        for i, (name, scale) in enumerate(PROMPTS.items()):
            plan = Plan.from_scheduler(pipe.scheduler, 6 + 2 * i)
            noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(i))
            plan.save(folder / f"{name}.plan")
            (folder / f"{name}.noise").write_bytes(noise.numpy().tobytes())
            (folder / f"{name}.text").write_bytes(texts[name].numpy().tobytes())
            files = f"{name}.plan {name}.noise {name}.text"
            lines.append(f"{name} {files} {scale} {name}.latent\n")
            weights = np.float32([1 - np.float32(scale), scale]).tolist()
            x = torch.tensor(plan.initial_scale, dtype=torch.float32) * noise
            self.requests[name] = Request(plan, x, {"text": texts[name]}, weights)
        (folder / "requests.txt").write_text("".join(lines))

    def answer(self, server: Path, *options: str | Path) -> dict[str, str]:
        """What the server says of each request."""
        with (self.folder / "requests.txt").open() as lines:
            said = capi.run(server, *options, stdin=lines, cwd=self.folder)
        return dict(line.split(" ", 1) for line in said.splitlines())

    def latent(self, name: str) -> Tensor:
        """What the server has written."""
        data = np.frombuffer((self.folder / f"{name}.latent").read_bytes(), np.float32)
        return torch.from_numpy(data.reshape(1, *SHAPE).copy())

    def in_python(self, model) -> dict[str, Tensor]:
        """The same from the Python engine."""
        engine = Engine(SHAPE, capacity=16)
        names = {engine.submit(request): name for name, request in self.requests.items()}
        with torch.no_grad():
            for batch in engine:
                engine.complete(batch, model(batch.x, batch.t, batch.conditioning["text"]))
        return {names[result.id]: result.x for result in engine.results()}


def test_with_the_same_outputs_the_bits_are_the_same(example: Path, tmp_path: Path) -> None:
    texts = {name: torch.randn(2, *TEXT) for name in PROMPTS}
    requests = Requests(tmp_path, texts)
    said = requests.answer(example / "sidestep_server")
    expected = requests.in_python(analytic)
    for i, name in enumerate(PROMPTS):
        assert said[name] == f"done: {6 + 2 * i} model calls"
        assert torch.equal(requests.latent(name), expected[name])


def test_skipping_calls(example: Path, tmp_path: Path) -> None:
    requests = Requests(tmp_path, {name: torch.randn(2, *TEXT) for name in PROMPTS})
    said = requests.answer(example / "sidestep_server", "--skip", "1000", "2")
    # warm-up is 4 steps; the published cap is not looked at in the first five decisions
    assert said == {
        "frog": "done: 4 model calls", "owl": "done: 4 model calls", "cat": "done: 5 model calls",
    }  # fmt: skip


def test_bad_requests_are_answered(example: Path, tmp_path: Path) -> None:
    requests = Requests(tmp_path, {name: torch.randn(2, *TEXT) for name in PROMPTS})
    (tmp_path / "short").write_bytes(b"1234")
    with (tmp_path / "requests.txt").open("a") as lines:
        lines.write("one two\nno nowhere.plan seed:1 - 1 x\nbad short seed:1 - 1 x\n")
        lines.write("few frog.plan short - 1 x\nnan frog.plan seed:1 - 1e38 x\n")
        lines.write("lost frog.plan seed:1 - 1 nowhere/x\nfull frog.plan seed:1 - 1 /dev/full\n")
    said = requests.answer(example / "sidestep_server")
    assert all(said[name].startswith("done: ") for name in PROMPTS)
    assert said["one"] == "failed: expected NAME PLAN NOISE TEXT SCALE OUT"
    assert said["no"].startswith("failed: plan: cannot open nowhere.plan")
    assert said["bad"] == "failed: plan: 4 bytes are fewer than its header has"
    assert said["few"] == "failed: short does not hold 1024 numbers"
    assert said["nan"].startswith("failed: engine: guidance[0] is -1e+38")
    assert said["lost"] == "failed: cannot write nowhere/x"
    assert said["full"] == "failed: cannot write /dev/full"


def test_a_model_that_cannot_be_opened(example: Path, tmp_path: Path) -> None:
    command = (example / "sidestep_server", "--onnx", onnx_runtime(), tmp_path / "missing.onnx")
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("server: ONNX Runtime: ") and "missing.onnx" in done.stderr


def onnx_runtime() -> Path:
    """The shared library in the wheel `onnxruntime`, which is not imported."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None, "pip install -e '.[test]'"
    (library,) = (Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*")
    return library


def test_the_bundled_unet_by_onnx_runtime(example: Path, tmp_path: Path) -> None:
    unet = tmp_path / "unet.onnx"
    runpy.run_path(str(EXAMPLE / "export_unet.py"))["export"](unet)
    pipe = load_pipeline("emoji-sd")
    texts = {}
    for name in PROMPTS:
        cond, uncond = pipe.encode_prompt([name], "cpu", 1, True)
        texts[name] = torch.cat([uncond, cond]).detach()
    requests = Requests(tmp_path, texts)
    lines = tmp_path / "requests.txt"
    capi.run(
        capi.tool("cmake"), f"-DSIDESTEP_EXAMPLE_ONNX={onnx_runtime()}",
        f"-DSIDESTEP_EXAMPLE_MODEL={unet}", f"-DSIDESTEP_EXAMPLE_REQUESTS={lines}", example,
    )  # fmt: skip
    ctest = Path(capi.tool("cmake")).parent / "ctest"
    assert "100% tests passed" in capi.run(ctest, "--test-dir", example, "--output-on-failure")
    expected = requests.in_python(lambda x, t, text: pipe.unet(x, t, text).sample)
    for name, picture in expected.items():
        difference = (requests.latent(name) - picture).abs().max() / picture.abs().max()
        print(f"{name}: {difference:.1e}")
        assert difference < ONNX_TOLERANCE, name
        image = pipe.vae.decode(picture / pipe.vae.config.scaling_factor).sample
        other = pipe.vae.decode(requests.latent(name) / pipe.vae.config.scaling_factor).sample
        assert (image - other).abs().max() < 2 / 255, name
    assert os.path.getsize(unet) > 10_000_000
