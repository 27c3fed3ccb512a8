"""`sidestep bench exits` on a tiny transformer: what the document says, and how it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
from tiny_exits import random_exits, write_exits

from sidestep.bench import exits as suite
from sidestep.bench import exits_report as report
from sidestep.bench.exits_grid import CACHE_THRESHOLDS, FAMILIES, UNCERTAINTIES
from sidestep.cli import main
from sidestep.runtime.exits.file import save_exits

BUDGETS = ("0.05", "1000")


@pytest.fixture(scope="module")
def exits(dit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Exits of the frozen model, and AdaDiff's."""
    transformer = diffusers.DiffusionPipeline.from_pretrained(dit).transformer
    folder = tmp_path_factory.mktemp("exits")
    save_exits(random_exits(transformer, after=(1, 2), kind="faithful"), folder / "faithful")
    return write_exits(transformer, folder, after=(1, 2)), folder / "faithful"


@pytest.fixture(scope="module")
def line(dit: Path, exits: tuple[Path, Path]) -> list[str]:
    line = ["bench", "exits", "--model", str(dit), "--exits", str(exits[0])]
    line += ["--prompts", "3", "--subset", "2"]
    line += ["--steps", "4", "--batch", "1", "--batch", "3"]
    return line + [word for budget in BUDGETS for word in ("--threshold", budget)]


def told(line: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main([*line, "--json"])
    captured = capsys.readouterr()
    assert not end.value.code, captured.err
    return json.loads(captured.out)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "exits.png"


@pytest.fixture
def document(
    line: list[str], dit: Path, exits: tuple[Path, Path], out: Path,
    capsys: pytest.CaptureFixture[str],
) -> dict[str, Any]:  # fmt: skip
    """All methods, measured by the first test that asks."""
    faithful = ["--faithful-model", str(dit), "--faithful-exits", str(exits[1])]
    return told([*line, *faithful, "--gate", "--out", str(out)], capsys)


def named(document: dict[str, Any], method: str, batch: int) -> list[dict[str, Any]]:
    return [r for r in report.of(document, 4, batch) if r["method"] == method]


def test_every_method_is_in_the_document(document: dict[str, Any], out: Path) -> None:
    assert document["command"] == "bench exits" and out.exists()
    assert document["exits"].startswith("sha256:") and "UNet middle block" in document["fd_small"]
    assert report.settings(document) == [(4, 1), (4, 3)]
    counts = {
        "full": 1, "static": 2, "sample": 2, "sample+adaptive": 2, "fixed-exit": 2, "adaptive": 5,
        "first-block-cache": len(CACHE_THRESHOLDS), "oracle": 2, "adadiff": len(UNCERTAINTIES),
    }  # fmt: skip
    for batch in (1, 3):
        for method, count in counts.items():
            assert len(named(document, method, batch)) == count, method
    assert {r["method"] for r in document["results"]} == {"full", *FAMILIES}
    keys = [(r["steps"], r["batch"], r["method"], r["setting"]) for r in document["results"]]
    assert len(keys) == len({*keys})


def test_what_was_measured_adds_up(document: dict[str, Any]) -> None:
    for r in document["results"]:
        assert r["solver"] == "ddim" and r["seconds"] > 0 and r["layers"] == r["share"] * 3
        assert r["pictures"] == (3 if r["batch"] == 3 else 1 if r["method"] == "oracle" else 2)
        assert (r["fd_small"] is None) == (r["batch"] == 1)
        assert r["psnr"] == pytest.approx(sum(r["images"]["psnr"]) / r["pictures"], abs=1e-3)
        assert r["psnr_p10"] == pytest.approx(min(r["images"]["psnr"]), abs=1e-3)
    (full,) = named(document, "full", 3)
    assert (full["share"], full["speedup"], full["psnr"]) == (1, 1, 100)
    assert full["fd_small"] == pytest.approx(0, abs=1e-6) and full["fd_small_other_seeds"] > 0
    fixed = {r["setting"]: r for r in named(document, "fixed-exit", 3)}
    assert fixed["block 1"]["share"] == pytest.approx(1 / 3)
    assert fixed["block 2"]["share"] == pytest.approx(2 / 3)
    # Without a limit everyone leaves at once, by whatever rule.
    for method in ("static", "sample", "oracle"):
        r = {r["setting"]: r for r in named(document, method, 3)}["1000"]
        assert r["share"] == pytest.approx(1 / 3) and r["nfe"] == 4 and r["threshold"] == 1000
        assert r["psnr"] == pytest.approx(fixed["block 1"]["psnr"], abs=1e-3)
        assert r["fd_small"] == pytest.approx(fixed["block 1"]["fd_small"], rel=1e-2)
    shares = {round(r["share"] * 4) for r in named(document, "static", 3)} - {4}
    fewer = named(document, "fewer-steps", 3)
    assert {r["nfe"] for r in fewer} == {max(1, n) for n in shares} and fewer
    assert all(r["share"] == r["nfe"] / 4 for r in fewer)
    cache = named(document, "first-block-cache", 3)
    assert all(1 / 3 <= r["share"] <= 1 and (r["share"] * 12) % 1 < 1e-6 for r in cache)
    assert all(r["psnr_own_full_to_full"] == 100 for r in named(document, "adadiff", 3))


def test_the_gate_is_in_the_document_and_in_the_report(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert [(entry["steps"], entry["budget"]) for entry in document["gate"]] == [
        (4, 0.05),
        (4, 1000),
    ]
    assert document["gate"][1]["layers_static"] == 1 == document["gate"][1]["layers_oracle"]
    assert document["gate_default"] == "static"  # nothing can be saved where all have left
    report.print_report(document)
    printed = capsys.readouterr().out
    assert "4 steps, batch 3" in printed and "first-block-cache" in printed
    assert "the gate is for mode 'static'" in printed
    assert "FD-small of full runs from other seeds" in printed
    lines = report.notes({**document, "first_block_cache": "ValueError: no such block"})
    assert lines[-1] == "first-block-cache: left out: ValueError: no such block"


def test_the_chart_has_a_panel_for_each_measure(document: dict[str, Any]) -> None:
    figure = report.chart(document)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["4 steps, batch 3", "", ""]
    saving = [r for r in report.of(document, 4, 3) if r["share"] < 1]
    (legend,) = figure.legends
    drawn = [text.get_text() for text in legend.get_texts()]
    assert drawn == list(dict.fromkeys(r["method"] for r in saving)) and len(drawn) >= 6
    for x, y, axis in (("share", "psnr", 0), ("speedup", "psnr", 1), ("share", "fd_small", 2)):
        line = figure.axes[axis].lines[0]  # of the first method
        points = sorted((r[x], r[y]) for r in saving if r["method"] == drawn[0])
        assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == points
    assert report.cell(None, ".1f") == report.cell(math.nan, ".1f") == "-"
    assert report.cell(1.26, ".1f") == "1.3"


def test_a_run_goes_on_where_it_was_interrupted(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "exits.png"
    asked = [*line, "--out", str(out), "--methods"]
    first = told([*asked, "static,fewer-steps"], capsys)
    assert {r["method"] for r in first["results"]} == {"full", "static", "fewer-steps"}
    run_jobs, seen = suite.run_jobs, []

    def noting(pipe: Any, jobs: Any, *arguments: Any, **more: Any) -> Any:
        seen.extend(job.label for job in jobs)
        return run_jobs(pipe, jobs, *arguments, **more)

    monkeypatch.setattr(suite, "run_jobs", noting)
    assert told([*asked, "static,fewer-steps"], capsys)["results"] == first["results"]
    assert seen == []
    state = out.with_suffix(".json")
    cut = json.loads(state.read_text())
    cut["results"] = [r for r in cut["results"] if (r["batch"], r["setting"]) != (3, "1000")]
    state.write_text(json.dumps(cut))
    again = told([*asked, "static,fewer-steps"], capsys)
    warm_up = "full all blocks"
    assert seen == [warm_up, "full all blocks", "static 1000"]
    assert len(again["results"]) == len(first["results"])
    seen.clear()
    told([*asked, "static", "--fresh"], capsys)
    assert seen.count("static 1000") == 2 and "fewer-steps 1 steps" not in seen


def test_bad_input_is_one_sentence(
    line: list[str], dit: Path, exits: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "x.png"
    for more, sentence in (
        (
            ["--methods", "magic"],
            "--methods: 'magic' is unknown, expected some of static, static-exits",
        ),
        (["--exits", "none"], "cannot read the exits file none"),
        (["--exits", str(exits[1])], "was trained with --mode faithful, expected --mode excess"),
        (["--model", "emoji-sd"], "StableDiffusionPipeline has no transformer to leave early"),
        (["--faithful-model", str(dit)], "--faithful-model and --faithful-exits: expected both"),
        (["--threshold", "0"], "--threshold: got 0.0, expected more than 0"),
        (["--batch", "0"], "--batch: got 0, expected more than 0"),
        (["--prompts", "0"], "--prompts: got 0, expected more than 0"),
        (["--out", str(tmp_path / "no" / "x.png")], "--out: cannot write"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*line, "--out", str(out), *more])
        error = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sidestep: ")]
        assert end.value.code == 2 and len(error) == 1 and sentence in error[0], error
    assert list(tmp_path.iterdir()) == []


def test_what_a_threshold_of_zero_costs(
    line: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = told(
        [*line, "--methods", "overhead", "--out", str(out.with_name("none.png"))], capsys
    )
    for batch in (1, 3):
        found = named(document, "overhead", batch)
        assert sorted(r["setting"] for r in found) == ["sample", "static"]
        for r in found:
            assert r["bit_equal"] and r["share"] == 1 and r["threshold"] == 0 and r["speedup"] > 0
    lines = [said for said in report.notes(document) if "threshold 0" in said]
    assert len(lines) == 4 and all("the same bits as the full model" in said for said in lines)
    assert {r["method"] for r in document["results"]} == {"full", "overhead"}
