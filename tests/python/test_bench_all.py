"""``sidestep bench all``: what fails is said and stops nothing, and no figure is forgotten."""

import json
from pathlib import Path

import click
import pytest
import typer.main

from sidestep.bench import everything
from sidestep.bench.suites import SUITES, Suite
from sidestep.cli import app, main

ROOT = Path(__file__).resolve().parents[2]


def _suite(name: str, *command: str, prints: bool = True) -> Suite:
    return Suite(name, command, (f"{name}.json",), 1, (), 0.5, threads=1, prints=prints)


FEW = (
    _suite("doctor", "doctor", "--json"),
    _suite("refused", "bench", "step", "--repeats", "0", "--json"),
    _suite("silent", "doctor"),  # prints no JSON
    _suite("again", "doctor", "--json"),
)


def _code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "all", *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_a_failure_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "SUITES", FEW)
    out = tmp_path / "results"
    assert _code("--out", str(out), "--json") == 1
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    assert document["command"] == "bench all" and "torch" in document["environment"]
    failed = {one["name"]: one["failed"] for one in document["results"]}
    assert failed["doctor"] is failed["again"] is None
    assert failed["refused"] == "exit code 2"
    assert failed["silent"].startswith("no document: ")
    assert {file.name for file in out.iterdir()} == {"doctor.json", "again.json"}
    for one in document["results"]:
        if one["failed"] is None:
            assert one["document"] == json.loads((out / f"{one['name']}.json").read_text())
            assert one["document"]["environment"]["threads"] == 1
    assert "bench all: 1 of 4, doctor: about 1 min; 4 min for this and the rest" in captured.err
    assert "sidestep: --repeats: got 0, expected more than 0" in captured.err
    assert captured.err.endswith("bench all: 2 failed: refused, silent\n")


def test_one_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "SUITES", FEW)
    assert _code("--only", "again", "--quick", "--out", str(tmp_path)) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["again.json"]
    captured = capfd.readouterr()
    assert captured.out == "" and "1 of 1, again: about 0.5 min" in captured.err


def test_a_file_that_was_not_written_is_a_failure(
    tmp_path: Path,
) -> None:
    suite = Suite("doctor", ("doctor", "--json"), ("doctor.json", "doctor.png"), 1, (), 1)
    document = everything.run([suite], tmp_path, False, lambda line: None)
    assert document["results"][0]["failed"] == "doctor.png not written"


def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _code("--only", "stepp", "--out", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.startswith("sidestep: --only: got stepp, expected one of step, compare, ")
    monkeypatch.setattr(everything, "PROFILING", tmp_path)
    assert _code("--only", "solvers", "--list") == 2
    assert "solvers needs solver_table.py in" in capsys.readouterr().err
    assert _code("--only", "step", "--list") == 0


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("suite", [s for s in SUITES if s.script is None], ids=lambda s: s.name)
def test_commands_are_understood(suite: Suite, quick: bool, tmp_path: Path) -> None:
    """Every option of every command is one that the command line has."""
    _, _, _, *arguments = everything.command_of(suite, tmp_path, quick)
    command: click.Command = typer.main.get_command(app)
    while isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    context = command.make_context(suite.name, arguments)
    assert context.params["out"].name in suite.writes if "out" in context.params else True


def test_all_that_is_published_is_measured() -> None:
    """Every document and every page of docs/results, and every script that makes one."""
    written = {name for suite in SUITES for name in suite.writes}
    published = {file.name for file in (ROOT / "docs/results").iterdir()}
    assert published <= written
    scripts = {suite.script for suite in SUITES} - {None}
    assert scripts == {
        f.name for f in (ROOT / "profiling").glob("*.py") if "pages.make" in f.read_text()
    }
