"""``sidestep plan``, ``sidestep.auto`` and the methods of the command line that follow from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_builders import tiny_dit
from tiny_cases import CASES

import sidestep
from sidestep import planning
from sidestep.cli import main
from sidestep.cli.compare import _print_table
from sidestep.errors import UserError
from sidestep.models import load_pipeline
from sidestep.planning_load import busy
from sidestep.runtime.latency import Latency, Overhead
from sidestep.runtime.planner import Candidate


@pytest.fixture(scope="module")
def small(tiny: Path) -> Any:
    """A tiny pipeline with its text encoder."""
    return load_pipeline(str(tiny))


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    return captured.out, captured.err


def _fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == ""
    return captured.err


def _like(measured: planning.Measured, *, a: float) -> planning.Measured:
    """The same pipeline on a device with t(b) = 10 ms (a + (1 - a) b)."""
    points = tuple((b, 0.01 * (a + (1 - a) * b)) for b in (0.5, 1.0, 2.0, 64.0))
    return planning.Measured(
        latency=Latency(points), overhead=Overhead(), images=measured.images,
        branches=measured.branches, trajectory=measured.trajectory,
    )  # fmt: skip


def test_plan_keeps_the_json_contract(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    out = tmp_path / "plan.png"
    text, _ = _run(
        capsys, "plan", "--model", str(tiny), "--steps", "9", "--ranks", "1",
        "--ranks", "4", "--max-batch", "8", "--iterations", "2", "--device", "cpu",
        "--out", str(out), "--json",
    )  # fmt: skip
    document = json.loads(text)
    assert document["command"] == "plan" and document["branches"] == 2
    points = document["latency"]["points"]
    assert [point["evaluations"] for point in points] == [0.5, 1, 2, 4]
    assert all(point["seconds"] > 0 for point in points)
    assert 0 <= document["latency"]["a"] <= 1 and document["overhead"]["record"] > 0
    results = document["results"]
    assert [(r["steps"], r["ranks"]) for r in results] == [(9, 1), (9, 4)]
    for result in results:
        kinds = [one["kind"] for one in result["candidates"]]
        assert {"serial", "srds"} <= set(kinds) and result["choice"] in result["candidates"]
        assert ("guidance" in kinds) == (result["ranks"] == 4) and result["reason"]
    assert document["checks"] == []
    assert Image.open(out).size[0] > 1000


def test_plan_says_what_it_chose(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    measure = planning.measure
    monkeypatch.setattr(planning, "measure", lambda *a, **k: _like(measure(*a, **k), a=0))
    monkeypatch.setattr("sidestep.cli.plan._REPEATS", 1)
    text, _ = _run(
        capsys, "plan", "--model", str(tiny), "--steps", "25", "--ranks", "1", "--max-batch", "4",
        "--width", "3", "--out", str(tmp_path / "p.png"),
    )  # fmt: skip
    words = " ".join(text.split())
    assert "10 ms x (0.00 + 1.00 b)" in words
    assert "25 steps on 1 rank: serial: a call with" in words
    assert "nothing is gained by making calls together" in words


def test_processes_that_share_the_device_are_measured_at_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    out = tmp_path / "plan.png"
    arguments = ["plan", "--model", str(tiny), "--steps", "12", "--max-batch", "4", "--json"]
    text, _ = _run(capsys, *arguments, "--processes", "2", "--budget", "2", "--out", str(out))
    found = json.loads(text)
    assert [result["ranks"] for result in found["results"]] == [1, 2]
    one, two = found["results"]
    serial = [
        next(c["seconds"] for c in result["candidates"] if c["kind"] == "serial")
        for result in (one, two)
    ]
    assert serial[0] == serial[1]  # of one process alone, in both
    error = _fail(capsys, *arguments, "--processes", "2", "--ranks", "2")
    assert "--processes: got 2 with --ranks, expected one of the two" in error
    with pytest.raises(UserError, match="beside this one ended with code"):
        with busy(str(tmp_path / "none"), 1, 1):
            pass


def test_auto_measures_without_a_trace(small: Any) -> None:
    before = type(small), type(small.unet), type(small.scheduler)
    state = torch.get_rng_state()
    method = sidestep.auto(small, 8, images=2, max_batch=8, repeats=1)
    assert method is None or isinstance(method, sidestep.SRDS)
    assert (type(small), type(small.unet), type(small.scheduler)) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_measured_calls_are_those_of_the_pipeline(small: Any) -> None:
    sizes = []
    handle = small.unet.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(args[0])), with_kwargs=True
    )
    measured = planning.measure(small, 6, 2, max_batch=8, repeats=1)
    handle.remove()
    assert (measured.images, measured.branches) == (2, 2)
    assert sizes[:2] == [4, 4]  # the first step of both recordings
    assert sizes[-4:] == [1, 2, 4, 8]
    assert [size for size, _ in measured.latency.points] == [0.5, 1, 2, 4]


@pytest.mark.parametrize("name", ["StableDiffusionXL", "Flux", "DiT", "Wan", "ControlNet"])
def test_other_pipelines_are_measured_with_their_own_arguments(name: str) -> None:
    case, prompts = CASES[name], [1, 2]
    pipe = case.build()
    inputs = {"output_type": "latent", **case.inputs(pipe, prompts, True), **case.settings}
    measured = planning.measure(pipe, 8, 2, max_batch=4, repeats=1, **inputs)
    assert (measured.images, measured.branches) == (2, 2)
    assert [size for size, _ in measured.latency.points] == [0.5, 1, 2]
    assert measured.overhead.tick + measured.overhead.evaluation > 0 and measured.plan(8).candidates


def test_the_choice_follows_the_device(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = planning.measure(small, 8, max_batch=4, repeats=1)
    for a, chosen in ((0.0, False), (1.0, True)):
        monkeypatch.setattr(planning, "measure", lambda *_, a=a, **__: _like(measured, a=a))
        method = sidestep.auto(small, 100)
        assert isinstance(method, sidestep.SRDS) == chosen


def test_pipelines_that_want_more_than_a_prompt_are_refused(
    small: Any,
) -> None:
    with pytest.raises(UserError, match=r"auto: DiTPipeline cannot be called with .*class_labels"):
        planning.measure(tiny_dit(), 8)
    with sidestep.enable(small, sidestep.Adaptive()):
        with pytest.raises(ValueError, match="enabled already"):
            planning.measure(small, 8)


def test_a_candidate_is_checked_for_real(small: Any) -> None:
    measured = planning.measure(small, 9, max_batch=4, repeats=1)
    best = next(o for o in measured.plan(9, iterations=2).candidates if o.kind == "srds")
    found = planning.check(small, measured, best, tolerance=1e9, rounds=1, prompt=["bus"])
    assert (found.steps, found.blocks, found.images) == (9, best.blocks, 1)
    assert 1 <= found.iterations[0] <= found.blocks and found.ticks <= 9
    assert found.speedup == found.seconds[0] / found.seconds[1] > 0
    assert found.predicted == found.predicted_seconds[0] / found.predicted_seconds[1] > 0
    assert found.foretold == best.speedup


def test_only_srds_on_one_rank_can_be_checked(small: Any) -> None:
    measured = planning.measure(small, 8, max_batch=4, repeats=1)
    serial = Candidate(
        kind="serial", steps=8, ranks=1, ticks=8, evaluations=8, seconds=1, speedup=1
    )
    with pytest.raises(UserError, match="got serial on 1 ranks, expected SRDS on one"):
        planning.check(small, measured, serial)


def test_compare_shows_srds(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    out = tmp_path / "p.png"
    text, _ = _run(
        capsys, "compare", "bus", "fox face", "--model", str(tiny), "--steps", "8", "--method",
        "srds", "--tolerance", "0", "--blocks", "4", "--out", str(out), "--json",
    )  # fmt: skip
    document = json.loads(text)
    plain, srds = document["results"]
    assert plain["iterations"] is None and 1 <= srds["iterations"] <= 4
    assert srds["psnr"] > 60 and srds["ticks"] <= 8 and srds["nfe"] > 8
    assert document["pictures"] == [str(out)]  # no chart of skipped calls
    _print_table(document["results"])
    assert f"srds: {srds['iterations']:.1f} iterations, " in capsys.readouterr().out


def test_generate_decides_by_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    text, said = _run(
        capsys, "generate", "bus", "--model", str(tiny), "--steps", "6", "--method", "auto",
        "--out", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert said.startswith("auto: ") and json.loads(text)["results"][0]["method"] == "auto"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "--steps", "0"], "--steps: got 0, expected more than 0"),
        (["plan", "--ranks", "0"], "--ranks: got 0, expected more than 0"),
        (["plan", "--max-batch", "0"], "--max-batch: got 0, expected more than 0"),
        (["plan", "--width", "-1"], "--width: got -1, expected more than 0"),
        (["plan", "--iterations", "0"], "--iterations: got 0"),
        (["plan", "--out", "x.xyz"], "ends in '.xyz'"),
        (["compare", "x", "--blocks", "4"], "--blocks: got it with --method adaptive, expected"),
        (["compare", "x", "--method", "srds", "--mode", "paper"], "--mode: got it with"),
        (["compare", "x", "--method", "srds", "--tolerance", "-1"], "tolerance is -1"),
        (["generate", "x", "--method", "srds", "--blocks", "0"], "blocks is 0"),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    error = _fail(capsys, *arguments)
    assert sentence in error and error.startswith("sidestep: ") and error.count("\n") == 1
