"""The code on the pages under docs/ runs, and prints what its comments say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sidestep
from sidestep.models import exits_of, load_pipeline

DOCS = Path(__file__).resolve().parent.parent / "docs"


def _code(page: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks, f"{page} holds no code"
    return "\n".join(blocks)


def test_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = _code("plans.md")
    names: dict = {}
    exec(code, names)
    promised = re.search(r"print\(plan\)  # (.*)", code)
    assert promised and capsys.readouterr().out.splitlines()[0] == promised[1]
    assert names["x"].shape == (1, 4, 64, 64)
    assert names["Plan"].load("sampler.plan") == names["plan"]


@pytest.mark.parametrize("page, steps", [("adaptive.md", 50), ("whole-trajectory.md", 25)])
def test_methods_on_a_pipeline(page: str, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {"pipe": load_pipeline("emoji-sd")}
    exec(_code(page), names)
    assert len(names["images"]) == 1
    assert f"{steps} steps, 1 images" in capsys.readouterr().out


def test_srds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first block here, the second one in two processes, as torchrun starts them."""
    first, second, _ = re.findall(r"```python\n(.*?)```", (DOCS / "srds.md").read_text(), re.DOTALL)
    names: dict = {"pipe": load_pipeline("emoji-sd")}
    exec(first.replace("=100", "=16"), names)
    assert "16 steps, 1 images" in capsys.readouterr().out
    script = tmp_path / "job.py"
    head = "import sidestep\npipe = sidestep.load_pipeline('emoji-sd')\n"
    tail = "import zlib\nprint('made', zlib.crc32(images[0].tobytes()), flush=True)\n"
    script.write_text(head + second.replace("=100", "=8") + tail)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, str(script)], capture_output=True, text=True)
    made = re.findall(r"made (\d+)", done.stdout)
    assert done.returncode == 0 and len(made) == 2 and len(set(made)) == 1, done


def test_srds_with_exits(capsys: pytest.CaptureFixture[str]) -> None:
    *_, block = re.findall(r"```python\n(.*?)```", (DOCS / "srds.md").read_text(), re.DOTALL)
    small = "num_inference_steps=9, use_resolution_binning=False, height=64, width=64, "
    block = block.replace("num_inference_steps=100", small + "max_sequence_length=24")
    block = block.replace('"exits.safetensors"', "exits_of('emoji-dit')")
    names = {"pipe": load_pipeline("emoji-dit"), "sidestep": sidestep, "exits_of": exits_of}
    exec(block, names)
    assert "evaluations were drafts" in capsys.readouterr().out


def test_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"pipe": load_pipeline("emoji-sd")}
    exec(_code("calibration.md"), names)
    made = names["sidestep"].Calibration.load("emoji.json")
    assert made.threshold in (0.01, 0.02) and made.fresh["images"] == 4
    summary = names["handle"].summary()
    assert f"threshold={made.threshold}" in summary.method and summary.steps == 10
    assert "10 steps, 1 images" in capsys.readouterr().out


def test_engine(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {"pipe": load_pipeline("emoji-sd")}
    exec(_code("engine.md"), names)
    lines = capsys.readouterr().out.splitlines()
    engine = names["engine"]
    D, capacity, R, H, G, e = 4 * 16 * 16, 16, 4, 3, 2, 4
    state = capacity * D * (4 * R + H * G * e) + 16385 * 4 * ((R + 1) * (R + 2) + 3)
    assert int(lines[0]) == engine.memory_bytes == state + 4 * D + 8 * capacity
    assert sorted(line.split(" done ")[0] for line in lines[1:]) == [
        "cat with an umbrella",
        "frog on a bicycle",
    ]
    assert engine.counts()["done"] == 3
    assert (names["last"].status, names["last"].nfe) == ("done", (12.0,))


def test_serving(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {"pipe": load_pipeline("emoji-sd")}
    exec(_code("serving.md"), names)
    frog, owl = capsys.readouterr().out.splitlines()
    assert frog == "(64, 64) 12 (12.0,) (0.0,)"
    calls = int(names["made"].model_calls[0])
    assert owl == f"(64, 64) 20 ({calls}.0,) ({20 - calls}.0,)" and calls < 20
    assert names["late"].cancelled() and names["service"].state == "closed"
    assert names["penguin"].size == (64, 64)


def test_sample(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    exec(_code("sample.md"), names)
    assert names["result"].shape == names["fewer"].shape == (2, 4, 8, 8)
    assert capsys.readouterr().out.count("\n") == 1


def test_profiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = _code("profiling.md")
    names: dict = {"pipe": load_pipeline("emoji-sd")}
    exec(code, names)
    promised = re.findall(r"print\(.*\)  # (.*)", code)
    assert len(promised) == 2 and capsys.readouterr().out.splitlines() == promised
    assert (tmp_path / "trace.json").stat().st_size > 100_000


def test_what_profiling_names_is_there() -> None:
    page = (DOCS / "profiling.md").read_text()
    scripts = set(re.findall(r"profiling/\w+\.(?:py|sh)", page))
    assert len(scripts) == 6 and all((DOCS.parent / script).is_file() for script in scripts)
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert len(pictures) == 4 and all((DOCS / picture).is_file() for picture in pictures)


def test_the_roofline_of_the_page() -> None:
    page = (DOCS / "profiling.md").read_text()
    (arguments,) = re.findall(r"^python (profiling/roofline.py .*)$", page, re.MULTILINE)
    command = [sys.executable, *arguments.split()]
    table = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=True)
    assert table.stdout in page
