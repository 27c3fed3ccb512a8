"""The pages for operators, kernel engineers and researchers: code and commands run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_sdxl_folder
import torch
from tiny_exits import write_exits

from sidestep import Adaptive, EarlyExit, enable
from sidestep.adapters.calling import own_size
from sidestep.cli import main
from sidestep.models import load_pipeline
from sidestep.runtime.exits.rules import RULES
from sidestep.runtime.methods.criteria import CRITERIA
from sidestep.runtime.methods.criterion import Course, Observation
from sidestep.runtime.solvers import SOLVERS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page: str, language: str = "python") -> list[str]:
    """The page's code, block by block."""
    fenced = rf"^( *)```{language}\n(.*?)^ *```"
    found = re.findall(fenced, (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{page} holds no {language}"
    return [block for _, block in found]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of Stable Diffusion XL with a few thousand weights."""
    return tiny_sdxl_folder.write(tmp_path_factory.mktemp("models") / "SDXL")


def test_what_an_operator_rolls_out(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = load_pipeline("emoji-sd")
    names: dict[str, Any] = {"pipe": pipe}
    before = dict(vars(pipe.unet)), type(pipe.unet), type(pipe.scheduler)
    code = "\n".join(blocks("operators.md"))
    exec(code, names)
    promised = re.findall(r"print\(.*\)  # (.*)", code)
    first, *told = capsys.readouterr().out.splitlines()
    assert promised == [first] and len(told) == 2
    assert names["plain"].shape == (1, 3, 64, 64)
    assert 5 < names["line"]["nfe"] < 25 and 20 < names["line"]["psnr"] < 100
    for line in told:
        logged = eval(line)
        assert logged["steps"] == 25 and logged["nfe"] == logged["most"] == logged["ticks"] < 25
        assert sum(logged["reasons"].values()) == 25 and logged["reasons"]["skipped"] > 0
    assert (dict(vars(pipe.unet)), type(pipe.unet), type(pipe.scheduler)) == before
    safe, bold = (
        names["shadow"](pipe, Adaptive(threshold=t), "blue tiger face", 1, num_inference_steps=25)
        for t in (0.005, 0.2)
    )
    assert torch.equal(safe[0], bold[0])  # the plain picture, either way
    assert bold[1]["nfe"] < safe[1]["nfe"] and bold[1]["psnr"] < safe[1]["psnr"]


def test_an_operators_commands(
    sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them, as they stand there, on a tiny SDXL; float32 and few pictures, for the CPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SDXL").symlink_to(sdxl)
    (tmp_path / "prompts.txt").write_text("fox face\nbus\n")
    lines = "\n".join(blocks("operators.md", "bash")).splitlines()
    commands = [shlex.split(line.split(" > ")[0]) for line in lines if line.strip()]
    assert [command[:2] for command in commands] == [
        ["sidestep", name] for name in ("doctor", "compare", "plan", "calibrate")
    ]
    quick = {"plan": ["--budget", "2"], "calibrate": ["--images", "9", "--threshold", "0.001"]}
    for _, *command in commands:
        with pytest.raises(SystemExit) as end:
            float32 = ["--dtype", "float32"] if "float16" in command else []
            main([*command, *float32, *quick.get(command[0], [])])
        shown = capsys.readouterr()
        assert end.value.code == 0, shown.err
        if "--json" in command:
            plain, adaptive = json.loads(shown.out)["results"]
            assert plain["nfe"] == 25 > adaptive["nfe"] and adaptive["batch"] == 2
    made = json.loads((tmp_path / "sdxl.json").read_text())
    assert (made["target"], made["steps"], made["guidance"]) == ("psnr>=30", 25, 5)
    assert made["scheduler"]["class"] == "EulerDiscreteScheduler"


@pytest.fixture
def tables() -> Iterator[None]:
    """What a page enters in the tables of modes is taken out again."""
    kept = [(table, dict(table)) for table in (CRITERIA, SOLVERS, RULES)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


def test_a_researchers_criterion_and_solver(
    tables: None, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"pipe": load_pipeline("emoji-sd")}
    criterion, measured, solver, _ = blocks("researcher.md")
    torch.manual_seed(0)
    exec(criterion, names)
    summary = names["handle"].summary()
    assert 25 > summary.nfe[0] > 8 and "mode='turning'" in summary.method
    exec(measured, names)
    safe, bold = names["tried"]
    assert sum(bold.nfe) < sum(safe.nfe) < 4 * 25
    exec(solver, names)
    told = capsys.readouterr().out.splitlines()
    assert told[-4].startswith("turning 0.1: ") and told[-3].startswith("turning 0.4: ")
    assert told[-2].startswith("<Plan dpmsolver++ order 2: 20 calls, 2 registers, t ")
    assert told[-1] == "True"
    assert names["pipe"].scheduler.plan().name.endswith("lean=0.6") and len(names["images"]) == 1
    ddim = SOLVERS["ddim"].plan(names["schedule"], "karras", 20)
    straight = names["Leaning"](lean=0.0).plan(names["schedule"], "karras", 20)
    x = names["start"]
    torch.testing.assert_close(straight.run(model, x), ddim.run(model, x), rtol=1e-10, atol=1e-10)


def model(x: torch.Tensor, t: float) -> torch.Tensor:
    return x.sin() + t / 1000


def test_a_researchers_criterion_is_of_the_row_alone(tables: None) -> None:
    """Its number has the same bits whatever rows are beside a row."""
    names: dict[str, Any] = {"pipe": load_pipeline("emoji-sd")}
    exec(blocks("researcher.md")[0], names)
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(5, 4, 16, 16, generator=generator) for _ in range(3)]

    def number(rows: slice) -> torch.Tensor:
        turning = names["Turning"](names["Turning"].DEFAULTS)
        turning.start(Course(rows=len(x[0][rows]), steps=9))
        for k in range(2):
            seen = Observation(
                step=k, x=x[k][rows], x_next=x[k + 1][rows], output=None, computed=[True] * 5
            )
            value = turning.measure(seen)
        return value

    together = number(slice(None))
    step = [(x[k + 1] - x[k]).flatten(1) for k in range(2)]
    expected = 1 - torch.cosine_similarity(step[1], step[0])
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(number(slice(i, i + 1))[0], together[i]) for i in range(5))


def test_a_researchers_exit_rule(
    dit: Path, tables: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = sized(load_pipeline(str(dit)))
    write_exits(pipe.transformer, tmp_path, after=(1, 2))
    (code,) = blocks("researcher.md")[3:]
    names: dict[str, Any] = {"pipe": pipe}
    exec(code, names)
    assert names["handle"].summary().layers == ((1.0,) * 5 + (3.0,) * 5,)

    def latents() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        made = pipe("bus", num_inference_steps=3, generator=generator, output_type="latent")
        return made.images

    plain = latents()
    for share, same in ((0.0, True), (0.4, False)):
        method = EarlyExit(exits="exits.safetensors", mode="switch", threshold=share)
        with enable(pipe, method):
            assert torch.equal(latents(), plain) == same


def test_early_exit(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = sized(load_pipeline(str(dit)))
    write_exits(pipe.transformer, tmp_path, after=(1, 2))
    (code,) = blocks("early-exit.md")
    names: dict[str, Any] = {"pipe": pipe}
    exec(code, names)
    assert len(names["images"]) == 1 and names["handle"].summary().blocks == 3
    assert "of 3 blocks a step" in capsys.readouterr().out


def sized(pipe: Any) -> Any:
    """A pipeline that makes its own size by itself, as large ones do."""
    more = own_size(pipe)

    class Sized(type(pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **more, **kwargs)

    pipe.__class__ = Sized
    return pipe


def test_a_kernel_engineers_road(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(blocks("kernel-engineer.md"))
    exec(code, {})
    told = capsys.readouterr().out.splitlines()
    promised = re.findall(r"print\(.*\)  # (.*)", code)
    assert told[:4] == promised[:4]
    assert told[4:] == ["native True", "reference True"] and promised[4:] == ["True"]


def test_every_operator_goes_the_road_that_the_page_shows() -> None:
    """Each has what `solver_step` has there; CUDA C++ is only where the page says so."""
    page, root = (DOCS / "kernel-engineer.md").read_text(), DOCS.parent
    kinds = ("test_{}", "test_{}_errors", "test_{}_operator", "test_{}_elsewhere", "gpu_{}")
    for kind in (*kinds, "aot_compile_{}"):
        assert f"{kind.format('solver_step')}.py" in page
        for stem in ("parareal", "exits"):
            assert (root / "tests/kernels" / f"{kind.format(stem)}.py").is_file(), (kind, stem)
    cuda = {path.stem for path in (root / "csrc/kernels/cuda").glob("*.cu")}
    assert cuda == {"exit_compact", "parareal", "solver_step"} and "`exit_score` has none" in page
