"""`sidestep bench srds`: counts against the schedule, the document, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_emoji
import torch
from torch import Tensor

from sidestep.bench import srds as suite
from sidestep.bench import srds_report as report
from sidestep.bench.srds_iterates import Iterates, iterates
from sidestep.bench.srds_picard import ParaDiGMS
from sidestep.bench.srds_results import Entry, Made, enter, label_of, new_entry
from sidestep.cli import main
from sidestep.errors import UserError
from sidestep.kernels.core import simulate_parareal
from sidestep.models import load_pipeline
from sidestep.runtime.methods.srds import SRDS, formation_ticks
from sidestep.sampling import Job, Run, run_jobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline folder."""
    return tiny_emoji.write_linear_pipeline(tmp_path_factory.mktemp("models") / "tiny")


# -- the document ----------------------------------------------------------------------------------


def pictures(*levels: float) -> Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 16, 16).clone()


def made_of(levels: list[float], **settings: Any) -> Made:
    values = {
        "images": pictures(*levels), "latents": 2 * pictures(*levels), "iterations": [1, 2],
        "ticks": [5, 8], "nfe": [12.0, 20.0], "estimates": [0.0, 0.03], "seconds": 3.0,
    }  # fmt: skip
    return Made(**{**values, **settings})


def serial_of(levels: list[float], seconds: float) -> Run:
    return Run(
        job=Job(label="serial"), solver="ddim", images=pictures(*levels),
        latents=2 * pictures(*levels), seconds=[seconds], sizes=[len(levels)],
    )  # fmt: skip


def test_an_entry_sums_up_its_images() -> None:
    entry = new_entry("novel", 10, SRDS(), solver="ddim", batch=2)
    enter(entry, made_of([0.5, 0.51]), serial_of([0.5, 0.5], 6.0), 0)
    assert entry["images"]["psnr"] == [100.0, 40.0]  # a picture that equals the serial one: 100 dB
    assert entry["images"]["error"] == [0.0, 0.02]
    assert entry["depth"] == (10 / 5 + 10 / 8) / 2 and entry["ticks"] == 6.5
    assert (entry["iterations"], entry["nfe"], entry["psnr"]) == (1.5, 16.0, 70.0)
    assert (entry["exact"], entry["good"], entry["honest"]) == (0.5, 1.0, 1.0)
    assert (entry["psnr_p5"], entry["speedup"], entry["processes"]) == (40.0, 2.0, 1)
    last = {name: value[:1] for name, value in vars(made_of([0.9])).items() if name != "seconds"}
    enter(entry, Made(**last, seconds=99.0), serial_of([0.5], 1.0), 2)
    assert entry["images"]["index"] == [0, 1, 2] and entry["prompts"] == 3
    assert entry["good"] == pytest.approx(2 / 3) and entry["honest"] == pytest.approx(2 / 3)
    assert entry["seconds"] == 3.0  # a batch that is not full is not timed
    assert "ParaDiGMS 0.03" == label_of(ParaDiGMS(window=4, tolerance=0.03))


def test_a_tiny_run_counts_as_the_schedule_says_and_is_continued(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    out, saved = tmp_path / "chart.png", []
    monkeypatch.setattr(report, "save_figure", lambda _figure, path: saved.append(path.name))
    command = ["bench", "srds", "--model", str(folder), "--steps", "9", "--set", "novel"]
    command += ["--prompts", "3", "--batch", "2", "--paradigms", "2", "--tolerance", "1e-4"]
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--out", str(out), "--json", "--iterates", "0"])
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    document = json.loads(captured.out)
    assert saved == ["chart.png", "chart-wavefront.png"]
    assert [Path(p).name for p in document["pictures"]] == saved
    found = {r["method"] + " " + r["setting"]: r for r in document["results"]}
    assert set(found) == {"srds krylov", "paradigms 0.1", "paradigms 0.03"}
    parallel = found["srds krylov"]
    bounds = SRDS().bounds(9)
    chart = simulate_parareal(bounds, len(bounds) - 1).chart
    images = parallel["images"]
    for count, ticks, nfe in zip(images["iterations"], images["ticks"], images["nfe"], strict=True):
        assert ticks == formation_ticks(bounds, count)[count, -1]
        assert 9 < nfe <= np.count_nonzero(chart[:, 0] < ticks)  # starts that have not moved
    assert parallel["depth"] == pytest.approx(np.mean([9 / n for n in images["ticks"]]))
    assert parallel["psnr"] > 60 and parallel["honest"] == 1.0 and parallel["good"] == 1.0
    assert images["index"] == [0, 1, 2] and found["paradigms 0.1"]["images"]["index"] == [0, 1]
    assert found["paradigms 0.03"]["settings"] == "ParaDiGMS(window=5, tolerance=0.03)"
    assert found["paradigms 0.03"]["psnr"] > 40

    def never(*_arguments: Any, **_settings: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(suite, "run_jobs", never)
    settings = suite.Settings(
        model=str(folder), solver="ddim", prompts=3, guidance=7.5, seed=0, batch=2,
        srds=SRDS(tolerance=1e-4), peers=2,
    )  # fmt: skip
    job = {"settings": settings, "sets": ["novel"], "steps": [9], "coarse": [], "fresh": False}
    again = suite.run(**job, state=out.with_suffix(".json"))
    assert again["results"] == document["results"]


def test_an_interrupted_run_goes_on_at_its_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, batches = tmp_path / "state.json", []
    settings = suite.Settings(
        model=str(folder), solver="dpmsolver++", prompts=3, guidance=2.0, seed=5, batch=1,
        srds=SRDS(blocks=2, tolerance=0), peers=1,
    )  # fmt: skip
    job = {"settings": settings, "sets": ["trained"], "steps": [4], "state": state, "fresh": False}

    def counted(pipe: Any, jobs: list[Job], texts: list[str], **rest: Any) -> list[Run]:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append((rest["seed"], [each.label for each in jobs]))
        return run_jobs(pipe, jobs, texts, **rest)

    monkeypatch.setattr(suite, "run_jobs", counted)
    with pytest.raises(KeyboardInterrupt):
        suite.run(**job, coarse=["krylov", "hold"])
    assert batches == [
        (5, ["serial", "SRDS krylov", "SRDS hold"]), (6, ["SRDS hold", "SRDS krylov", "serial"]),
    ]  # fmt: skip
    batches = [(0, [])]
    document = suite.run(**job, coarse=["hold"])
    assert batches[1:] == [(7, ["serial", "SRDS hold"])]
    counts = {r["setting"]: r["images"]["index"] for r in document["results"]}
    assert counts == {"krylov": [0, 1], "hold": [0, 1, 2]}  # and no ParaDiGMS with two registers
    for r in document["results"]:  # nothing is left of two iterations over two blocks
        assert min(r["images"]["psnr"]) > 90 and set(r["images"]["ticks"]) == {4}
    with pytest.raises(UserError, match="was made with another seed"):
        suite.run(**{**job, "settings": replace(settings, seed=6)}, coarse=[])


def test_coarse_solvers_and_spacings_are_compared_each_with_each(
    folder: Path, tmp_path: Path
) -> None:
    settings = suite.Settings(
        model=str(folder), solver="ddim", prompts=1, guidance=2.0, seed=5, batch=1,
        srds=SRDS(blocks=3, tolerance=0), peers=0,
    )  # fmt: skip
    document = suite.run(
        settings=settings, sets=["novel"], steps=[7], coarse=["hold", "2m"],
        spacing=["steps", "log-snr"], state=tmp_path / "state.json", fresh=False,
    )  # fmt: skip
    found = {r["setting"]: r for r in document["results"]}
    assert list(found) == ["hold", "2m", "hold log-snr", "2m log-snr"]
    for r in found.values():
        assert r["images"]["ticks"] == [7] and r["psnr"] > 90
    assert "spacing='log-snr'" in found["2m log-snr"]["settings"]


def test_runs_of_srds_have_iterations_and_no_skip_map(folder: Path) -> None:
    job = Job(label="SRDS", method=SRDS(blocks=2, max_iterations=1), steps=4)
    [run] = run_jobs(load_pipeline(str(folder)), [job], ["fox", "bus", "frog"], batch=2)
    assert run.iterations == [1, 1, 1] and run.image_ticks == [3, 3, 3] and run.ticks == [3, 3]
    assert run.called is None and run.criterion is None and len(run.errors) == 3
    assert run.latents.shape == (3, 4, 16, 16) and len(run.images) == 3


# -- pictures and tables ---------------------------------------------------------------------------


def test_iterates_come_to_the_serial_picture(folder: Path) -> None:
    pipe = load_pipeline(str(folder))
    own = pipe.scheduler
    found = iterates(
        pipe, SRDS(blocks=3, max_iterations=1), scheduler="DDIMScheduler", steps=6,
        prompts=["fox", "bus"], seeds=[3, 9], guidance=5.0,
    )  # fmt: skip
    assert pipe.scheduler is own
    assert found.ticks == [3, 4, 5, 6] and found.pictures.shape[:2] == (2, 4)
    assert found.stops == [1, 1] and found.ends == [4, 4]
    assert min(found.psnr(3)) > 90 > 60 > max(found.psnr(0))
    figure = report.iterates_figure(found)
    texts = [axis.get_xlabel() for axis in figure.axes]
    assert texts.count("6 ticks") == 2
    assert sum(text.endswith("stops here") for text in texts) == 2
    assert any(text.startswith("4 ticks, ") for text in texts)


def test_many_iterates_are_left_out_but_for_where_an_image_stops() -> None:
    found = Iterates(
        steps=20, prompts=["fox", "bus"], pictures=torch.zeros(2, 11, 3, 8, 8),
        serial=torch.full((2, 3, 8, 8), 0.5), ticks=list(range(10, 21)), stops=[1, 9],
        ends=[11, 19],
    )  # fmt: skip
    figure = report.iterates_figure(found)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["coarse sweep", *(f"iteration {p}" for p in (1, 2, 3, 9)), "serial"]
    assert [axis.get_xlabel() for axis in figure.axes[-6:]] == [
        *(f"{10 + p} ticks, 6.0 dB" for p in range(4)), "19 ticks, 6.0 dB\nstops here", "20 ticks",
    ]  # fmt: skip


def result(name: str, steps: int, method: str, depth: float, good: float) -> Entry:
    kind, setting = method.split()
    return {
        "set": name, "steps": steps, "method": kind, "setting": setting, "prompts": 64,
        "iterations": 2.0, "ticks": steps / depth, "depth": depth, "nfe": 99.0, "good": good,
        "psnr": 50.0, "psnr_p5": 40.0, "psnr_p10": 41.0, "honest": 0.98, "seconds": 4.0,
        "speedup": 0.5, "processes": 1,
    }  # fmt: skip


def test_the_report_judges_and_marks_what_is_not_good(capsys: pytest.CaptureFixture[str]) -> None:
    document = {
        "solver": "ddim",
        "results": [
            result("novel", 100, "paradigms 0.1", 7.0, 0.5),
            result("novel", 100, "srds krylov", 2.6, 0.94),
            result("novel", 25, "srds krylov", 1.6, 1.0),
            result("trained", 25, "srds krylov", 1.8, 0.97),
            result("trained", 25, "srds hold", 1.1, 0.99),
        ],
    }
    lines = report.targets(document)
    assert [line.split(":")[0].split(",")[0] for line in lines] == ["novel", "novel", "trained"]
    assert "novel, 25 steps, target 1.4 at 95% of the prompts 40 dB or more: holds" in lines[0]
    assert "fails (2.60 at 94% of 64 prompts)" in lines[1] and "holds (1.80" in lines[2]
    report.print_report(document)
    printed = capsys.readouterr().out
    assert "ParaDiGMS 0.1" in printed and "98% of the estimates hold" in printed
    figure = report.depth_chart(document)
    assert [axis.get_title() for axis in figure.axes] == ["novel", "trained"]
    points = {
        (line.get_xdata()[0], line.get_ydata()[0]): line.get_markerfacecolor()
        for line in figure.axes[0].lines
        if line.get_marker() not in ("None", "_") and len(line.get_xdata()) == 1
    }
    assert points[100, 7.0] == points[100, 2.6] == "white" != points[25, 1.6]


def test_the_wavefront_has_the_calls_of_the_formula() -> None:
    figure = report.wavefront_chart(SRDS(blocks=20), 100, 3)
    title = figure.get_suptitle()
    # K(m - 1) + B ticks, m(KB - K(K - 1)/2) + B - K calls
    assert "32 ticks (3.12x fewer), 302 model calls for them" in title
    cells = figure.axes[0].collections[0].get_array()
    shown = {p: int((cells == p).sum()) for p in range(5)}
    assert shown[0] == 20 and sum(shown[p] for p in range(4)) == 302
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert labels == ["coarse sweep", *(f"iteration {p}" for p in (1, 2, 3)), "later iterations"]


def test_what_the_report_shows_again_is_the_first_and_the_last_to_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def fake(_pipe: Any, method: SRDS, **given: Any) -> Iterates | None:
        seen.update(given)
        return None

    monkeypatch.setattr(report, "iterates", fake)
    settings = suite.Settings(
        model=str(folder), solver="ddim", prompts=4, guidance=7.5, seed=100, batch=4, srds=SRDS(),
        peers=0,
    )  # fmt: skip
    entry = {"set": "novel", "steps": 9, "images": {
        "index": [0, 1, 2, 3], "ticks": [7, 5, 9, 6], "psnr": [41.0, 42.0, 43.0, 44.0]}
    }  # fmt: skip
    report.remade(settings, entry, 2)
    assert seen["seeds"] == [101, 102] and seen["scheduler"] == "DDIMScheduler"
    texts = settings.texts("novel")
    assert seen["prompts"] == [texts[1], texts[2]]


BAD = [
    (["--set", "nonsense"], "'nonsense' is not one of"),
    (["--blocks", "30"], "SRDS: 30 blocks of 25 steps, expected at most 25"),
    (["--blocks", "0"], "SRDS: blocks is 0, expected a whole number of 1 or more"),
    (["--tolerance", "-1"], "SRDS: tolerance is -1.0, expected 0 or more"),
    (["--coarse", "fine"], "SRDS: coarse is 'fine', expected one of: 'krylov', 'hold', '2m'"),
    (["--spacing", "t"], "SRDS: spacing is 't', expected one of: 'steps', 'log-snr'"),
    (
        ["--coarse", "2m", "--solver", "DDPMScheduler"],
        "SRDS: DDPM does not show what the model predicts, for it is stochastic",
    ),
    (["--paradigms", "-1"], "--paradigms: got -1, expected 0 or more"),
    (["--paradigms-tolerance", "-2"], "--paradigms-tolerance: got -2.0, expected 0 or more"),
    (["--steps", "0"], "--steps: got 0, expected more than 0"),
    (["--solver", "nonsense"], "--solver: 'nonsense' is neither one of ours"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=[" ".join(o) for o, _ in BAD])
def test_bad_input_is_one_sentence(
    options: list[str], sentence: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["bench", "srds", "--model", str(folder), "--out", str(tmp_path / "a.png")]
    with pytest.raises(SystemExit) as exit_:
        main([*command, *options])
    assert exit_.value.code != 0
    error = " ".join(capsys.readouterr().err.split())
    assert sentence in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())
