"""`sidestep bench adaptive`: the policies by value, the oracle against brute force, a tiny run."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sidestep.bench import adaptive as suite
from sidestep.bench import adaptive_oracle as oracle
from sidestep.bench import adaptive_report as report
from sidestep.bench.adaptive_grid import Policy, families, policies
from sidestep.bench.adaptive_policies import Anchors, Levels, Sada, Schedules, Uniform, Zeus
from sidestep.cli import main
from sidestep.errors import UserError
from sidestep.runtime.methods.criterion import Course, Criterion, Decision, Observation
from sidestep.runtime.plan import Plan

SHAPE = (2, 1, 3, 3)


def drive(
    criterion: Criterion,
    steps: int,
    exploding: bool = False,
    data: Callable[[int], float] = lambda _k: 0.0,
) -> tuple[list[str], list[Decision | None], list[Tensor]]:
    """A DDIM-like loop on latents ``alpha x0 + sigma eps`` whose true x0 at step k is ``data(k)``.

    Returns:
        "#" computed, "." skipped for every step of row 0, the decisions, and the latents.
    """
    course = Course(rows=2, steps=steps, log_snr=[-2 + 0.1 * k for k in range(steps)])
    levels = Levels(course, exploding)
    criterion.start(course)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    xs = [levels.alpha[k] * data(k) + levels.sigma[k] * noise for k in range(steps)]
    marks, decisions, decision = "", [], None
    for k in range(steps - 1):
        computed = [True, True] if decision is None else decision.compute
        marks += "#" if computed[0] else "."
        decision = criterion.observe(
            Observation(step=k, x=xs[k], x_next=xs[k + 1], output=noise, computed=computed)
        )
        decisions.append(decision)
    return marks + ("#" if decision.compute[0] else "."), decisions, xs


def weights_of(decisions: list[Decision | None], step: int) -> list[float]:
    """The weights of row 1 at ``step``."""
    return pytest.approx(list(decisions[step - 1].weights[1]))


def test_uniform_patterns_and_weights() -> None:
    marks, decisions, _ = drive(Uniform(every=3, reuse="linear").criterion(), 16)
    assert marks == "#####..#..#..#.."
    assert weights_of(decisions, 5) == [2.0, -1.0]  # computed 4 and 3
    assert weights_of(decisions, 6) == [3.0, -2.0]
    assert weights_of(decisions, 8) == [4 / 3, -1 / 3]  # computed 7 and 4
    marks, decisions, _ = drive(Uniform(every=2).criterion(), 12)
    assert marks == "#####.#.#.#."
    assert weights_of(decisions, 5) == [1.0]
    assert drive(Uniform(every=2).criterion(), 50)[0].count("#") == 27


def test_schedules_are_row_by_row() -> None:
    criterion = Schedules(computed=((0, 1, 4), (0, 2, 3))).criterion()
    marks, decisions, _ = drive(criterion, 5)
    assert marks == "##..#"
    assert [d.compute[1] for d in decisions] == [False, True, True, False]


def test_zeus_pattern_and_interleaved_weights() -> None:
    marks, decisions, _ = drive(Zeus(every=4, late=False).criterion(), 50)
    skipped = {k for k in range(10, 45) if k % 4}
    assert marks == "".join("." if k in skipped else "#" for k in range(50))
    assert weights_of(decisions, 13) == [2.0, -1.0]
    assert weights_of(decisions, 14) == [1.0]
    assert weights_of(decisions, 15) == [2.0, -1.0]


def test_zeus_late_phase_interpolates_x0() -> None:
    def cubic(k: int) -> float:
        return 1 + 0.1 * k - 0.01 * k**2 + 0.001 * k**3

    marks, decisions, xs = drive(Zeus(every=3).criterion(), 50, data=cubic)
    # x0 is stored at 24, 28, 32, 36; from then on only every 4th step is computed, up to 45
    assert marks[37:] == "...#...#####" + "#"
    levels = Levels(Course(rows=2, steps=50, log_snr=[-2 + 0.1 * k for k in range(50)]), False)
    for k in (37, 43):
        decision = decisions[k - 1]
        assert decision.weights == [(0.0,), (0.0,)]
        data = levels.data(xs[k], decision.offset, k)
        assert torch.allclose(data, torch.full(SHAPE, cubic(k)), rtol=1e-3)


def test_anchors_wait_for_all_points_and_end() -> None:
    anchors = Anchors(first=4, end=10, interval=2, points=2)
    assert [k for k in range(12) if anchors.hit(k)] == [4, 6, 8]
    anchors.store(4, torch.tensor([1.0]))
    assert anchors.predict(5) is None
    anchors.store(6, torch.tensor([3.0]))
    assert anchors.predict(9).item() == 6.0
    assert anchors.predict(10) is None


@pytest.mark.parametrize("exploding", [False, True])
def test_levels_turn_noise_into_data_and_back(exploding: bool) -> None:
    levels = Levels(Course(rows=1, steps=2, log_snr=[0.0, 1.0]), exploding)
    alpha = 1.0 if exploding else math.sqrt(1 / (1 + math.exp(-2)))
    assert levels.alpha[1] == pytest.approx(alpha)
    assert levels.sigma[1] == pytest.approx(alpha * math.exp(-1))
    x, eps = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    data = levels.data(x, eps, 1)
    assert data.item() == pytest.approx((2 - levels.sigma[1] * 0.5) / alpha)
    assert levels.noise(x, data, 1).item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="log_snr is unknown"):
        Levels(Course(rows=1, steps=2), exploding)
    with pytest.raises(ValueError, match="hides"):
        levels.data(x, None, 0)


def test_sada_skips_by_its_sign_and_its_window() -> None:
    # With x on a straight line over the steps there is no bend: the product is 0, hence stable.
    criterion = Sada(max_interval=2, begin=0.2, end=0.8, late=False).criterion()
    criterion.start(Course(rows=1, steps=20, log_snr=[-2 + 0.1 * k for k in range(20)]))
    marks, decision = "", None
    for k in range(19):
        computed = [True] if decision is None else decision.compute
        marks += "#" if computed[0] else "."
        x, x_next = torch.full((1, 2), 1.0 * k), torch.full((1, 2), k + 1.0)
        decision = criterion.observe(
            Observation(step=k, x=x, x_next=x_next, output=torch.ones(1, 2), computed=computed)
        )
    assert marks == "####..#..#..#..####"


def test_sada_goes_on_with_the_three_step_rule() -> None:
    _, decisions, xs = drive(Sada(begin=0.2, end=0.8, late=False).criterion(), 20)
    levels = Levels(Course(rows=2, steps=20, log_snr=[-2 + 0.1 * k for k in range(20)]), False)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    slopes = [-0.1 * (levels.sigma[k] ** 2 * xs[k] - levels.sigma[k] * noise) for k in range(20)]
    z = xs[3] - (5 * slopes[3] + 5 * slopes[2] - 4 * slopes[1]) / 6
    x0 = (z - levels.sigma[4] * noise) / levels.alpha[4]
    expected = (xs[4] - levels.alpha[4] * x0) / levels.sigma[4]
    assert decisions[3].weights == [(0.0,), (0.0,)]
    assert torch.allclose(decisions[3].offset, expected, atol=1e-5)
    assert torch.allclose(decisions[3].offset, noise, atol=0.02)  # it is a good approximation


def test_every_family_has_settings_that_differ() -> None:
    assert {"default", "paper", "uniform-linear", "zeus", "sada", "oracle"} <= set(families())
    for family in families():
        found = policies(family, 50, False)
        assert found and {p.family for p in found} == {family}
        assert len({p.label for p in found}) == len(found), family


def brute_force(runs: np.ndarray, calls: int) -> float:
    """The least cost of ``calls`` computed steps, by looking at all of them."""
    K = len(runs)
    best = math.inf
    for rest in itertools.combinations(range(1, K), calls - 1):
        chosen, cost = [0, *rest], 0.0
        for m, i1 in enumerate(chosen):
            i2 = chosen[m - 1] if m else 0
            cost += runs[i2, i1, chosen[m + 1] if m + 1 < calls else K]
        best = min(best, cost)
    return best


def cost_of(runs: np.ndarray, chosen: tuple[int, ...]) -> float:
    ends = [*chosen[1:], len(runs)]
    before = [0, *chosen[:-1]]
    return float(sum(runs[i2, i1, j] for i2, i1, j in zip(before, chosen, ends, strict=True)))


def test_dynamic_programming_equals_brute_force() -> None:
    runs = np.random.default_rng(0).random((9, 9, 10))
    found = oracle.best_schedules(runs, 9)
    for calls in range(1, 10):
        assert len(found[calls]) == calls and found[calls][0] == 0
        assert cost_of(runs, found[calls]) == pytest.approx(brute_force(runs, calls))


def test_deviations_are_those_of_a_run_of_skips() -> None:
    K, D = 6, 5
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(K, 2, 3, generator=generator, dtype=torch.float64).numpy()
    plan = Plan(name="p", matrices=matrices, timesteps=np.arange(K), input_scales=np.ones(K))
    outputs = torch.randn(K, D, generator=generator)
    away = oracle.deviations(plan, outputs, None)
    state = truth = torch.randn(2, D, generator=generator)
    for k in range(2, 5):  # computed: 0 and 1
        M = torch.tensor(matrices[k], dtype=torch.float32)
        line = outputs[1] + (outputs[1] - outputs[0]) * (k - 1)
        state = M[:, :2] @ state + M[:, 2:] * line
        truth = M[:, :2] @ truth + M[:, 2:] * outputs[k]
        expected = (state - truth)[0].square().mean().sqrt().item()
        assert away[0, 1, k + 1] == pytest.approx(expected, rel=1e-4)
    assert (away[0, 1, :3] == 0).all()


def test_moves_shift_one_step_and_never_the_first() -> None:
    found = oracle.moves(frozenset({0, 2, 5}), 6)
    assert set(found) == {
        frozenset(s) for s in ({0, 1, 5}, {0, 3, 5}, {0, 2, 4}, {0, 4, 5}, {0, 2, 3})
    }
    assert oracle.uniform(6, 12) == {0, 1, 2, 3, 4, 11}


def test_equal_calls_are_interpolated_on_the_upper_edge() -> None:
    points = [(10.0, 20.0, 9.0), (20.0, 40.0, 30.0), (15.0, 22.0, 20.0), (30.0, 35.0, 33.0)]
    assert report.edge(points) == [points[0], points[2], points[1]]
    assert report.at_calls(points, 17.5) == (31.0, 25.0)
    assert report.at_calls(points, 10) == (20.0, 9.0) and report.at_calls(points, 9) is None
    assert report.at_calls(points, 25) == (40.0, 30.0) and report.at_calls(points, 31) is None


TINY = [
    "bench", "adaptive", "--prompts", "2", "--steps", "8", "--solver", "euler",
    "--subset", "1", "--oracle-trials", "4",
]  # fmt: skip


def run_tiny(capsys: pytest.CaptureFixture[str], out: Path, *options: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as exit_:
        main([*TINY, "--out", str(out), "--json", *options])
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    return json.loads(captured.out)


def test_a_tiny_run_is_complete_and_is_continued(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "chart.png"
    chosen = {
        "uniform-linear": Policy(
            family="uniform-linear", label="1 in 4", method=Uniform(every=4, reuse="linear")
        ),
        "oracle": Policy(family="oracle", label="5 calls", calls=5),
    }
    monkeypatch.setattr(suite, "policies", lambda family, *_rest: [chosen[family]])
    document = run_tiny(capsys, out, "--policies", "uniform-linear,oracle")
    assert [Path(p).name for p in document["pictures"]] == ["chart.png", "chart-first.png"]
    assert out.stat().st_size > 10_000
    found = {(r["policy"], r["setting"]): r for r in document["results"]}
    uniform = found["uniform-linear", "1 in 4"]
    assert uniform["calls"] == 5 and uniform["ratio"] == pytest.approx(8 / 5)
    assert len(uniform["images"]["psnr"]) == 2 and uniform["psnr"] > 10
    assert 0.2 < uniform["ssim"] <= 1 and uniform["speedup"] > 0
    best = found["oracle", "5 calls"]
    assert best["images"]["calls"] == [5.0] and best["speedup"] is None
    assert best["psnr"] > uniform["images"]["psnr"][0]  # its schedule was one of the starts

    def never(*_arguments: Any, **_settings: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(suite, "run_jobs", never)
    again = run_tiny(capsys, out, "--policies", "uniform-linear")
    assert again["results"] == document["results"]


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    common = {"solvers": ["ddim"], "steps": [8], "oracle_trials": 1}
    settings = suite.Settings(model="emoji-sd", prompts=1, guidance=7.5, seed=0, batch=16, subset=1)
    state = tmp_path / "state.json"
    with pytest.raises(UserError, match="--policies: 'nonsense' is unknown"):
        suite.run(settings=settings, chosen=["nonsense"], state=state, fresh=False, **common)
    state.write_text(json.dumps({"command": "bench adaptive", "model": "another"}))
    with pytest.raises(UserError, match="was made with another model"):
        suite.run(settings=settings, chosen=[], state=state, fresh=False, **common)


def test_the_report_compares_and_judges(capsys: pytest.CaptureFixture[str]) -> None:
    def result(policy: str, calls: float, decibels: float) -> dict[str, Any]:
        return {
            "solver": "ddim", "steps": 50, "policy": policy, "setting": "s", "calls": calls,
            "ratio": 50 / calls, "psnr": decibels, "psnr_p10": decibels - 4, "speedup": 2.0,
            "images": {"calls": [calls] * 2, "psnr": [decibels - 4, decibels + 4]},
        }  # fmt: skip

    found = [("default", 20, 36), ("default", 30, 50), ("zeus", 24, 40), ("oracle", 20, 60)]
    document = {"prompts": ["a"] * 2, "results": [result(*r) for r in found]}
    document["results"][-1]["images"] = {"calls": [20], "psnr": [60]}
    table = report.compared(document, "ddim", 50)
    assert table["default"] == [
        pytest.approx((48.6, 44.6)), pytest.approx((41.6, 37.6)), (36.0, 32.0), None,
    ]  # fmt: skip
    assert table["zeus"] == [None, (40.0, 36.0), None, None]
    assert "oracle" not in table and report.subset(document, "ddim", 50) == 1
    first = report.compared(document, "ddim", 50, 1)
    assert first["oracle"][2] == (60.0, 60.0) and first["default"][2] == (32.0, 32.0)
    [line] = report.targets(document)
    assert "holds (s: 2.50x, 36.0 dB, 32.0 dB" in line
    report.print_report(document)
    assert "48.6 / 44.6" in capsys.readouterr().out
    for first, names in ((False, ["default", "zeus"]), (True, ["default", "zeus", "oracle"])):
        legend = report.chart(document, first=first).legends[0]
        assert [text.get_text() for text in legend.texts] == names
