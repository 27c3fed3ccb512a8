"""`sidestep bench srds --processes`: as one process, against the planner; jobs that do not end."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_emoji

from sidestep.bench import srds as suite
from sidestep.bench import srds_job, srds_processes, srds_report
from sidestep.bench.srds_processes_report import cells, section, verdict
from sidestep.bench.srds_results import Entry, GuidanceSplit
from sidestep.cli import main
from sidestep.errors import UserError
from sidestep.planning import Measured
from sidestep.runtime.latency import Latency, Overhead
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.plan import Plan
from sidestep.runtime.planner import predict

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline folder."""
    return tiny_emoji.write_linear_pipeline(tmp_path_factory.mktemp("models") / "tiny")


def command_of(folder: Path, out: Path, *more: str) -> list[str]:
    chosen = ["--steps", str(STEPS), "--set", "novel", "--prompts", "2", "--tolerance", "1e-4"]
    return ["bench", "srds", "--model", str(folder), "--out", str(out), *chosen, *more]


def code_of(command: list[str]) -> Any:
    with pytest.raises(SystemExit) as exit_:
        main(command)
    return exit_.value.code


def test_two_processes_make_the_pictures_of_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    settings = suite.Settings(
        model=str(folder), solver="ddim", prompts=2, guidance=7.5, seed=0, batch=4,
        srds=SRDS(tolerance=1e-4), peers=0,
    )  # fmt: skip
    job: dict[str, Any] = {"settings": settings, "sets": ["novel"], "steps": [STEPS], "coarse": []}
    state = tmp_path / "a.json"
    [alone] = suite.run(**job, state=state, fresh=False)["results"]
    command = command_of(folder, tmp_path / "a.png", "--processes", "2", "--json")
    assert code_of(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["pictures"] == [] and json.loads(state.read_text())["results"][0] == alone
    assert document["results"][0] == alone
    found = {f"{r['method']} {r['setting']}": r for r in document["results"][1:]}
    assert list(found) == ["srds krylov", "srds krylov max 1", "guidance split"]
    for r in found.values():
        assert set(r) - set(alone) == {"threads", "texts", "planner"} and set(alone) <= set(r)
        assert (r["processes"], r["batch"], r["images"]["index"]) == (2, 1, [0, 1])
        assert r["texts"] == settings.texts("novel") and r["threads"] >= 1
        assert r["speedup"] > 0 and len(r["batches"]["plain_seconds"]) == 2
    whole, capped, split = found.values()
    assert whole["images"]["iterations"] == alone["images"]["iterations"]
    assert whole["images"]["estimate"] == pytest.approx(alone["images"]["estimate"], abs=1e-4)
    assert whole["psnr"] > 60 and whole["honest"] == 1.0
    assert capped["images"]["iterations"] == [1, 1] and capped["honest"] is None
    assert capped["psnr"] > 40 and STEPS < capped["nfe"] < whole["nfe"]
    assert split["psnr"] > 90 and split["ticks"] == split["nfe"] == STEPS
    assert split["planner"]["predicted"] == split["planner"]["guidance"] > 0
    assert capped["planner"]["predicted"] > 0

    def never(*_arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(srds_processes, "pieces", never)
    again = srds_processes.run(**job, processes=2, state=state, fresh=False)
    assert again["results"] == document["results"]
    srds_report.print_report(again)
    printed = capsys.readouterr().out
    assert "on 2 processes" in printed and "guidance split" in printed
    assert "the planner picks" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("import time; time.sleep(600)", "gave no picture for 1 s, expected one; it was ended"),
        ("raise ValueError('out of paper')", "the job of 2 failed: ValueError: out of paper"),
        ("raise SystemExit(3)", "the job of 2 failed: it ended with code 3"),
    ],
)
def test_a_job_that_hangs_or_fails_is_one_sentence(
    program: str, sentence: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(srds_job, "command", lambda *_: [sys.executable, "-c", program])
    if "sleep" in program:
        monkeypatch.setattr(srds_job, "_START", 1.0)
        monkeypatch.setattr(srds_processes, "_LEAST", 0.0)
        monkeypatch.setattr(srds_processes, "_PATIENCE", 0)
    began = time.monotonic()
    assert code_of(command_of(folder, tmp_path / "a.png", "--processes", "2")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error and "Traceback" not in error
    assert not list(tmp_path.iterdir()) and time.monotonic() - began < 300


def test_the_first_process_that_failed_says_why(tmp_path: Path) -> None:
    srds_job.failure_file(tmp_path, 1).write_text("MemoryError: too much")
    assert srds_job._why(tmp_path, 1) == "MemoryError: too much"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--processes", "0"], "--processes: got 0, expected more than 0"),
        (
            ["--processes", "4", "--blocks", "3"],
            "--processes: got 4, expected at most 3, the blocks that SRDS has at 12 steps",
        ),
        (
            ["--processes", "2", "--coarse", "2m", "--solver", "DDPMScheduler"],
            "SRDS: DDPM does not show what the model predicts",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    options: list[str], sentence: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert code_of(command_of(folder, tmp_path / "a.png", *options)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def measured_of(*points: tuple[float, float]) -> Measured:
    none: Any = None
    overhead = Overhead(record=0.0, tick=0.0, evaluation=0.0, message=0.0)
    return Measured(
        latency=Latency(points), overhead=overhead, images=1, branches=2, trajectory=none
    )


def test_a_single_iteration_is_planned_without_those_ahead() -> None:
    import diffusers

    plan = Plan.from_scheduler(diffusers.DDIMScheduler(clip_sample=False), 100)
    measured = measured_of((0.5, 0.5), (1.0, 1.0), (32.0, 32.0))  # nothing gained by large calls
    whole, capped = SRDS(blocks=20), SRDS(blocks=20, max_iterations=1)
    said = srds_processes.forecast(measured, capped, plan, 2)
    assert said["choice"] == "guidance" and said["speedup"] == said["guidance"] == 2.0
    bounds = capped.bounds(plan)
    cost = predict(measured.latency, bounds, [1], ranks=2, most=1)
    # m B + B - 1 evaluations in m - 1 + B ticks
    assert cost.evaluations == 5 * 20 + 20 - 1 and cost.ticks == 5 - 1 + 20
    assert said["predicted"] == pytest.approx(100 / cost.seconds)
    assert predict(measured.latency, bounds, [1], ranks=2).seconds > cost.seconds
    own = srds_processes.forecast(measured, whole, plan, 2)["predicted"]
    assert own is None or own < said["predicted"]
    assert srds_processes.forecast(measured, GuidanceSplit(), plan, 2)["predicted"] == 2.0


def entry(method: str, setting: str, speedup: float, choice: str) -> Entry:
    return {
        "set": "novel", "steps": 25, "method": method, "setting": setting, "processes": 2,
        "solver": "ddim", "prompts": 4, "iterations": 1.5, "ticks": 30.0, "nfe": 90.0,
        "psnr": 50.0, "images": {"psnr": [45.0, 55.0]}, "seconds": 2.0, "speedup": speedup,
        "threads": 1, "planner": {"choice": choice, "speedup": 1.6, "predicted": None},
    }  # fmt: skip


def test_the_page_judges_the_planner_by_its_choice() -> None:
    results = [
        entry("srds", "krylov", 0.7, "guidance"),
        entry("guidance", "split", 1.5, "guidance"),
    ]
    assert verdict(results) == (
        "the planner picks guidance on 2 processes, 1.60x: holds, 1.50x measured"
    )
    assert "fails, 0.70x" in verdict([entry("srds", "krylov", 0.7, "srds")])
    assert "at best 0.70x" in verdict([entry("srds", "krylov", 0.7, "serial")])
    assert cells(results[0])[-4:] == ["45.0", "2.00", "0.70x", "-"]
    lines = section({"results": results})
    assert lines[1] == "## On two processes" and "### novel, 25 steps" in lines
    assert section({"results": [{"processes": 1}]}) == []


def test_a_task_that_breaks_off_ends_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    program = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr(srds_job, "command", lambda *_: [sys.executable, "-c", program])
    monkeypatch.setattr(srds_job, "_START", 3.0)
    task = srds_job.Task(
        model="", scheduler="", steps=1, guidance=1.0, seed=0, threads=1, timeout=0.0,
        prompts=[(0, "", [])],
    )  # fmt: skip
    with pytest.raises(UserError, match="gave no picture for 3 s"):
        next(srds_job.pieces(task, 2))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
