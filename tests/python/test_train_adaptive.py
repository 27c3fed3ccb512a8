"""`sidestep train adaptive`: what is recorded, what is fitted, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sidestep.cli import main
from sidestep.errors import UserError
from sidestep.models import BUNDLED, load_prompts
from sidestep.runtime.grids import GRIDS
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criteria.learned import SIGNALS, load_predictor
from sidestep.runtime.methods.criterion import Course, Observation
from sidestep.runtime.plan import Plan
from sidestep.runtime.schedules import DiscreteVP
from sidestep.runtime.solvers import find_solver
from sidestep.training.adaptive_predictor import (
    WARM_UP,
    Policy,
    PredictorTraining,
    Samples,
    explained,
    fit,
    record_run,
    save_predictor,
    training_prompts,
)
from sidestep.training.emoji_data import HeldOut

STEPS, ROWS = 12, 8


def plan() -> Plan:
    return find_solver("dpmsolver++2m").plan(
        DiscreteVP.scaled_linear(), GRIDS["linspace"], STEPS, prediction="epsilon"
    )


def model(x: torch.Tensor, t: float) -> torch.Tensor:
    """Smooth in both, and no straight line."""
    return torch.sin(x * (1 + t / 1000)) + 0.3 * x


def moved(table: Plan, k: int, state: list, u: torch.Tensor) -> list[torch.Tensor]:
    """The registers after step ``k``."""
    columns = torch.tensor(table.matrices[k])[:, : len(state) + 1]
    return list(torch.einsum("rc,c...->r...", columns, torch.stack([*state, u])))


def settings(**changes: object) -> PredictorTraining:
    return PredictorTraining(**{"out": "unused", "iterations": 300, **changes})  # type: ignore[arg-type]


def test_prompts_are_new_and_give_no_test_prompt_away() -> None:
    prompts = training_prompts(BUNDLED["emoji-sd"], 200, seed=0)
    test = HeldOut(load_prompts("novel"))
    assert len(prompts) == 200 and len(set(prompts)) > 150
    assert not any(test.gives_away(prompt) for prompt in prompts)
    captions = set((BUNDLED["emoji-sd"] / "captions.txt").read_text().split("\n"))
    assert all(prompt in captions for prompt in prompts[::2])
    assert not any(prompt in captions for prompt in prompts[1::2])
    assert prompts == training_prompts(BUNDLED["emoji-sd"], 200, seed=0)
    assert prompts != training_prompts(BUNDLED["emoji-sd"], 200, seed=1)


def test_the_policy_skips_at_random_and_by_the_error() -> None:
    rows, steps = 24, 60
    draw = torch.Generator().manual_seed(0)
    course = Course(rows=rows, steps=steps, log_snr=np.linspace(-3, 3, steps).tolist())
    policy = Policy(course, "damped", draw)
    walk = torch.randn(steps, rows, 50, generator=draw).cumsum(0) * 0.05 + 1
    called = [[True] * rows]
    for k in range(steps - 1):
        seen = Observation(
            step=k, x=walk[k], x_next=walk[k], output=walk[k].clone(), computed=called[-1]
        )
        called.append(policy(seen))
    computed = np.array(called)
    assert computed[:WARM_UP].all() and computed[-2:, 1::2].all()
    shares = computed.mean(0)
    assert shares[::2].min() < 0.5 and shares[::2].max() > 0.9
    assert shares[1::2].min() < shares[1::2].max() < 0.9
    for row in computed.T:
        gaps = np.diff(np.flatnonzero(row))
        assert (gaps[1:] <= gaps[:-1] + 1).all()


@pytest.mark.parametrize("reuse", ["damped", "hold"])
def test_errors_are_those_of_skipping(reuse: str) -> None:
    """Another run, of the same decisions, with every output put together by hand."""
    table = plan()
    x = torch.randn(ROWS, 4, 3, generator=torch.Generator().manual_seed(1))
    computed = torch.rand(STEPS, ROWS, generator=torch.Generator().manual_seed(2)) < 0.6
    computed[:WARM_UP] = True
    policy = lambda seen: computed[min(seen.step + 1, STEPS - 1)].tolist()  # noqa: E731
    samples = record_run(model, table, x, policy, reuse)
    kept = STEPS - 2
    assert samples.signals.shape == (kept * ROWS, len(SIGNALS))
    assert samples.checks.view(kept, ROWS).sum(0).tolist() == [0] * 7 + [kept]
    R = table.registers
    state = [x.double()] + [torch.zeros_like(x).double() for _ in range(R - 1)]
    log_snr = np.asarray(table.log_snr)
    outputs: list[list[np.ndarray]] = [[] for _ in range(ROWS)]
    steps: list[list[int]] = [[] for _ in range(ROWS)]
    shares = [0.5] * ROWS
    for k in range(STEPS):
        fresh = model(table.input_scales[k] * state[0], float(table.timesteps[k]))
        used = fresh.clone()
        for row in range(ROWS):
            now = fresh[row].numpy()
            if k >= 1:
                newest, line = outputs[row][0], np.zeros_like(now)
                if len(steps[row]) > 1 and reuse == "damped":
                    i, j = steps[row][:2]
                    line = newest - outputs[row][1]
                    line = line * (log_snr[k] - log_snr[i]) / (log_snr[i] - log_snr[j])
                guess = newest + shares[row] * line  # a multistep solver: nothing is straight
            if k >= 2:
                gap = math.sqrt(((guess - now) ** 2).mean() / (newest**2).mean())
                found = samples.errors.view(kept, ROWS)[k - 2, row]
                assert float(found) == pytest.approx(math.log(gap + 1e-8), abs=2e-3)
            if computed[k, row]:
                if k >= 1 and (line**2).sum() > 0:
                    product = float(((now - newest) * line).sum() / (line**2).sum())
                    shares[row] = min(1, max(0, product))
                outputs[row].insert(0, now)
                steps[row].insert(0, k)
            else:
                used[row] = torch.tensor(guess)
        state = moved(table, k, state, used)


def made_up(count: int) -> Samples:
    generator = torch.Generator().manual_seed(0)
    signals = torch.randn(count, len(SIGNALS), generator=generator) * 2 + 1
    errors = signals[:, 4] - 0.5 * signals[:, 3].clamp(-1, 1) - 3
    return Samples(signals=signals, errors=errors, checks=torch.arange(count) % 8 == 7)


def test_the_fit_finds_a_relation_and_repeats_itself() -> None:
    samples, losses = made_up(4000), []
    predictor = fit(samples, settings(), losses)
    assert len(losses) == 300 and losses[-1] < 0.1 * losses[0]
    assert explained(predictor, samples) > 0.97
    again = fit(samples, settings(), [])
    assert torch.equal(predictor.hidden, again.hidden) and torch.equal(predictor.outer, again.outer)
    other = fit(samples, settings(seed=1, iterations=5), [])
    assert not torch.equal(predictor.hidden, other.hidden)


def test_a_signal_that_is_never_known_does_no_harm() -> None:
    samples = made_up(2000)
    samples.signals[:, 8] = torch.nan
    predictor = fit(samples, settings(), [])
    assert torch.isfinite(predictor.outer).all() and explained(predictor, samples) > 0.9


def test_what_is_saved_is_what_was_fitted(tmp_path: Path) -> None:
    predictor = fit(made_up(500), settings(iterations=5, units=3, reuse="quadratic"), [])
    file = tmp_path / "predictor.safetensors"
    file.write_bytes(b"something older")
    save_predictor(predictor, file)
    read = load_predictor(str(file))
    assert read.reuse == "quadratic"
    for name in ("centre", "spread", "hidden", "outer"):
        assert torch.equal(getattr(read, name), getattr(predictor, name))
    with safe_open(file, framework="pt") as opened:
        assert sum(opened.get_tensor(key).numel() for key in opened.keys()) == 2 * 13 + 15 * 3 + 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"reuse": "cubic"}, "--reuse: got 'cubic', expected one of hold, linear"),
        ({"out": "/nowhere/at/all.safetensors"}, "--out: cannot write /nowhere/at/all"),
        ({"trajectories": 0}, "trajectories is 0, expected a number above 0"),
        ({"iterations": None}, "exactly one of minutes and iterations"),
    ],
)
def test_bad_settings_are_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        settings(**changes)


def test_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sidestep.training.adaptive_predictor.RUNS", [("DDIMScheduler", 6)])
    out = tmp_path / "predictor.safetensors"
    arguments = ["--trajectories", "1", "--batch", "1", "--iterations", "2", "--json"]
    with pytest.raises(SystemExit) as exit_:
        main(["train", "adaptive", "--out", str(out), *arguments])
    document = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0
    assert (document["command"], document["samples"]) == ("train adaptive", 6 - 2)
    assert document["iterations"] == 2 and document["explained"] is None
    assert Adaptive(mode="learned", predictor=str(out)).criterion().history == 2


def test_the_command_refuses_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "adaptive", "--out", "/nowhere/at/all.safetensors"])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and "--out: cannot write /nowhere" in captured.err
