"""`sidestep train adaptive`: what is recorded, what is fitted, and what is refused."""

from __future__ import annotations

import json
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
from sidestep.runtime.methods.reuse import reuse_weights
from sidestep.runtime.plan import Plan
from sidestep.runtime.schedules import DiscreteVP
from sidestep.runtime.solvers import find_solver
from sidestep.training.adaptive_predictor import (
    LONGEST,
    WARM_UP,
    PredictorTraining,
    Samples,
    explained,
    fit,
    random_policy,
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


def test_the_policy_warms_up_and_has_runs_of_every_length() -> None:
    computed = random_policy(60, 64, torch.Generator().manual_seed(0))
    assert computed[:WARM_UP].all()
    runs = [len(run) for row in computed.T for run in "".join("_#"[c] for c in row).split("#")]
    assert max(runs) == LONGEST and {1, 2, 3, 4} <= set(runs)
    shares = computed.float().mean(0)
    assert shares.min() < 0.3 and shares.max() > 0.8


@pytest.mark.parametrize("reuse", ["linear", "hold"])
def test_errors_are_those_of_really_skipping(reuse: str) -> None:
    """Another run, of the same decisions, in which one step is done both ways."""
    table = plan()
    x = torch.randn(ROWS, 4, 3, generator=torch.Generator().manual_seed(1))
    computed = random_policy(STEPS, ROWS, torch.Generator().manual_seed(2))
    samples = record_run(model, table, x, computed, reuse)
    kept = STEPS - 3
    assert samples.signals.shape == (kept * ROWS, len(SIGNALS))
    assert samples.checks.view(kept, ROWS).sum(0).tolist() == [0] * 7 + [kept]
    R = table.registers
    state = [x.double()] + [torch.zeros_like(x).double() for _ in range(R - 1)]
    log_snr = np.asarray(table.log_snr).tolist()
    outputs: list[list[torch.Tensor]] = [[] for _ in range(ROWS)]
    steps: list[list[int]] = [[] for _ in range(ROWS)]
    for k in range(STEPS):
        fresh = model(table.input_scales[k] * state[0], float(table.timesteps[k]))
        reused, used = fresh.clone(), fresh.clone()
        for row in range(ROWS):
            if steps[row]:
                weights = reuse_weights(reuse, steps[row], k, log_snr)
                pairs = zip(weights, outputs[row], strict=False)
                reused[row] = sum((w * u for w, u in pairs), torch.zeros_like(x[0]).double())
            if computed[k, row]:
                outputs[row].insert(0, fresh[row])
                steps[row].insert(0, k)
            else:
                used[row] = reused[row]

        if k >= 3:
            skipped, called, x_next = (
                moved(table, k, state, u)[0].flatten(1) for u in (reused, fresh, used)
            )
            gap = (skipped - called).abs().mean(1) / x_next.abs().mean(1)
            expected = (gap + 1e-8).log()
            found = samples.errors.view(kept, ROWS)[k - 3].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
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
        assert sum(opened.get_tensor(key).numel() for key in opened.keys()) == 2 * 10 + 12 * 3 + 1
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
    assert (document["command"], document["samples"]) == ("train adaptive", 6 - WARM_UP)
    assert document["iterations"] == 2 and document["explained"] is None
    assert Adaptive(mode="learned", predictor=str(out)).criterion().history == 2


def test_the_command_refuses_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "adaptive", "--out", "/nowhere/at/all.safetensors"])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and "--out: cannot write /nowhere" in captured.err
