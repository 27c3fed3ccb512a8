"""`sidestep train exits`: the losses by hand, exits of a frozen model, the commands, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_builders as build
import torch
from tiny_exits import BLOCKS, write_exits
from tiny_pipelines import tiny_sd

import sidestep
from sidestep.cli import main
from sidestep.errors import UserError
from sidestep.runtime.exits.file import load_exits
from sidestep.runtime.exits.plan import weights_of
from sidestep.training import exits_faithful
from sidestep.training.average import Average
from sidestep.training.emoji_run import TrainingResult
from sidestep.training.exits_excess import ExcessTraining, pipeline_runs, train_excess
from sidestep.training.exits_faithful import (
    SWITCHES,
    FaithfulTraining,
    by_token,
)
from sidestep.training.exits_fit import Fit, Learned
from sidestep.training.exits_losses import AdaDiffLoss, pinball
from sidestep.training.exits_measure import spearman
from sidestep.training.exits_trajectories import Trajectories, exit_places
from sidestep.training.optimise import optimise

# -- losses ---------------------------------------------------------------------------------------


def test_pinball_by_hand() -> None:
    value = torch.tensor([1.0, 1.0, 1.0])
    quantile = torch.tensor([0.0, 1.0, 3.0])
    assert float(pinball(quantile, value, 0.5)) == pytest.approx((0.5 + 0 + 1) / 3)
    assert float(pinball(quantile, value, 0.9)) == pytest.approx((0.9 + 0 + 0.2) / 3)


def test_pinball_is_least_at_the_quantile() -> None:
    values = torch.arange(100.0)
    losses = [float(pinball(torch.tensor(q), values, 0.9)) for q in range(100)]
    assert int(np.argmin(losses)) in (89, 90)


def two_layers() -> tuple[torch.Tensor, torch.Tensor]:
    """u and errors of two layers, one sample of a layer twice as certain as the other."""
    u = torch.tensor([[0.2, 0.6], [0.1, 0.1]])[:, :, None, None].requires_grad_()  # [2, 2, 1, 1]
    errors = torch.tensor([[[1.0, -2.0], [0.5, 0.5]], [[0.0, 0.0], [1.0, 1.0]]])[:, :, None, :]
    return u, errors


def test_adadiff_as_published_by_hand() -> None:
    u, errors = two_layers()
    t = math.tanh
    loss_u, loss_layers = AdaDiffLoss(weigh_u=2.0, weigh_layers=3.0)(u, errors)
    first = ((0.2 - t(1)) ** 2 + (0.2 - t(2)) ** 2 + 2 * (0.6 - t(0.5)) ** 2) / 4
    second = (2 * 0.1**2 + 2 * (0.1 - t(1)) ** 2) / 4
    assert loss_u.item() == pytest.approx(2 * (first + second), rel=1e-5)
    layers = (0.8 * 2.5 + 0.4 * 0.25) / 2 + (0.9 * 0 + 0.9 * 1) / 2
    assert loss_layers.item() == pytest.approx(3 * layers, rel=1e-5)
    assert not loss_layers.requires_grad


def test_adadiff_as_released_by_hand() -> None:
    u, errors = two_layers()
    released = AdaDiffLoss(batch_weights=True, mean_over_layers=True)
    loss_u, loss_layers = released(u, errors)
    assert loss_u.item() == pytest.approx(AdaDiffLoss()(u, errors)[0].item() / 2, rel=1e-6)
    assert loss_layers.item() == pytest.approx((0.6 * 1.375 + 0.9 * 0.5) / 1.5, rel=1e-5)
    loss_layers.backward()  # trains the uncertainty too: less certain of the worse layer
    assert u.grad is not None and (u.grad[0] < 0).all() and (u.grad[1] > 0).all()


def test_elements_are_in_the_order_of_the_head() -> None:
    tokens = torch.arange(2 * 6 * 12.0).view(2, 6, 12)  # 2 x 3 patches of 2 x 2, 3 channels
    picture = torch.einsum("nhwpqc->nchpwq", tokens.view(2, 2, 3, 2, 2, 3)).reshape(2, 3, 4, 6)
    assert torch.equal(by_token(picture, 2), tokens)


def test_places_and_ranks() -> None:
    assert exit_places(14, 3) == (4, 7, 11) and exit_places(8, 3) == (2, 4, 6)
    assert exit_places(2, 3) == (1,) and exit_places(1, 3) == ()
    assert exit_places(5, 9) == (1, 2, 3, 4)
    a = torch.tensor([0.1, 0.5, 0.2, 9.0])
    assert spearman(a, a.square()) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)


# -- exits of a frozen model ----------------------------------------------------------------------


def excess(tmp_path: Path, **changes: Any) -> ExcessTraining:
    values: dict[str, Any] = {
        "out": tmp_path / "exits", "prompts": range(40), "steps": 6, "guidance": 2.0,
        "trajectories": 12, "batch": 6, "iterations": 150, "lr": 1e-2, "sensitivity": 1,
        "probes": 4, "units": 8,
    }  # fmt: skip
    return ExcessTraining(**values | changes)


def test_excess_exits_of_a_frozen_model(tmp_path: Path) -> None:
    pipe = learnable_dit()
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    kinds = [type(module) for module in pipe.transformer.modules()]
    runs: list[int] = []
    settings = excess(tmp_path)
    result = train_excess(pipe, settings, lambda: runs.append(1))
    assert len(runs) == pipeline_runs(settings) and len(result.losses) == 150
    figures = result.figures
    assert all(e < 0.6 * u for e, u in zip(figures.errors, figures.untranslated, strict=True))
    assert -1 <= figures.rank <= 1 and 0.5 < figures.covered <= 1
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [type(module) for module in pipe.transformer.modules()] == kinds
    assert all(p.requires_grad for p in pipe.transformer.parameters())
    exits = load_exits(tmp_path / "exits")
    assert exits.after == (2, 3, 4) and exits.trained["steps"] == 6
    exits.check_model(pipe.transformer)
    assert exits.measured is not None
    assert exits.measured.errors.shape == (3, 6)
    assert exits.measured.stale.shape == exits.measured.growth.shape == (4, 6)
    assert bool((exits.measured.stale[1:].diff(dim=0) < 0).all())  # deeper exits have less behind
    method = sidestep.EarlyExit(exits=tmp_path / "exits", threshold=1e9, reuse=False)
    with sidestep.enable(pipe, method) as handle:
        pipe([3, 4], num_inference_steps=6, guidance_scale=2.0, output_type="np")
        assert handle.summary().mean_depth == 2.0


def learnable_dit() -> Any:
    """A pipeline whose later blocks add mostly what does not depend on the row."""
    pipe = build.tiny_dit(BLOCKS)
    torch.manual_seed(1)
    for block in pipe.transformer.transformer_blocks[2:]:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.normal_(block.norm1.linear.bias)
        torch.nn.init.normal_(block.ff.net[2].bias)
    return pipe


def test_the_fit_lowers_errors_and_foretells_them(tmp_path: Path) -> None:
    pipe = learnable_dit()
    settings = excess(tmp_path, iterations=200)
    pipe.transformer.requires_grad_(False)
    trajectories = Trajectories(pipe, settings, lambda _, h: h, lambda: None)
    with trajectories.recorder:
        calls = [call for _ in range(2) for call in trajectories.run(6)]
        learned = Learned.fresh(3, 16, 4, 8, 0, torch.device("cpu"))
        fit = Fit(trajectories.recorder, learned, trajectories.course, 0)

        def state(exit: int) -> tuple[float, float, float]:
            """RMS error, mean distance of q50 from ln e, share of errors below q90."""
            with torch.no_grad():
                seen = [fit.foretell(call, exit) for call in calls]
            squares = torch.cat([square for square, _ in seen])
            quantiles = torch.cat([quantile for _, quantile in seen])
            logs = squares.log() / 2
            away = (quantiles[:, 0] - logs).abs().mean()
            return (
                float(squares.mean().sqrt()),
                float(away),
                float((logs < quantiles[:, 1]).float().mean()),
            )

        before = [state(exit) for exit in range(3)]
        average = Average(learned.parameters, 0.9)
        for _ in optimise(settings, 0.0, average, lambda: fit.loss(calls), [], None):
            pass
        after = [state(exit) for exit in range(3)]
    for (error, away, _), (error_after, away_after, covered) in zip(before, after, strict=True):
        assert error_after < 0.5 * error and away_after < 0.7 * away
        assert 0.75 < covered < 0.99
    assert all(p.grad is None for p in pipe.transformer.parameters())


def test_sensitivity_is_what_one_exit_does_to_the_picture(tmp_path: Path) -> None:
    """W_k e_k of the picture that it was measured on is the RMS distance of the latents."""
    pipe = build.tiny_dit(BLOCKS)
    settings = excess(tmp_path, iterations=4, trajectories=6, batch=3)
    numbers = []
    train_excess(pipe, settings, lambda: numbers.append(1))
    exits = load_exits(tmp_path / "exits")
    number = 4 * settings.batch  # pictures before it: two rounds and two runs of measuring
    prompt = np.random.default_rng(0).permutation(40)[number % 40]
    seen: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []

    def run(exit_at: int | None) -> torch.Tensor:
        from sidestep.training.exits_record import Recorder

        assert exits.translators is not None
        with Recorder(pipe, exits.after) as recorder:
            calls = recorder.run(
                {
                    "class_labels": [int(prompt)], "num_inference_steps": 6,
                    "guidance_scale": 2.0, "output_type": "np",
                    "generator": [torch.Generator().manual_seed(number)],
                },
                1,
                lambda k: [1 if k == exit_at else None],
                exits.translators,
            )  # fmt: skip
            if exit_at is not None:
                call = calls[exit_at]
                head = recorder.head(
                    exits.translators(1, call.hidden[1].float()), call.args, call.kwargs
                )
                errors.append(call.guided_error(head).detach())
            seen.append(recorder.latents)
            weights = weights_of(exits, recorder.course)
            assert weights is not None
            return torch.from_numpy(weights)

    run(None)
    for step in (1, 4):
        weights = run(step)
        moved = float((seen[-1] - seen[0]).square().mean().sqrt())
        told = float(weights[step]) * float(errors[-1].sqrt())
        assert moved == pytest.approx(told, rel=1e-2)


def test_what_excess_refuses(tmp_path: Path) -> None:
    for changes, sentence in (
        ({"prompts": []}, "no prompt was given"),
        ({"out": tmp_path / "no" / "exits"}, "--out: cannot write"),
        ({"steps": 0}, "steps is 0, expected a number above 0"),
        ({"sensitivity": 0}, "sensitivity is 0, expected 1 or more"),
    ):
        with pytest.raises(UserError, match=sentence):
            excess(tmp_path, **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="StableDiffusionPipeline has no transformer to train"):
        train_excess(tiny_sd(), excess(tmp_path))
    with pytest.raises(UserError, match="one block only, there is no place for an exit"):
        train_excess(build.tiny_dit(1), excess(tmp_path))
    with pytest.raises(UserError, match="training: steps is 3, expected 4 or more"):
        excess(tmp_path, steps=3)
    pipe = build.tiny_dit(2)
    pipe.scheduler = diffusers.PNDMScheduler(**build.BETAS, skip_prk_steps=True)
    with pytest.raises(UserError, match="PNDMScheduler does not say how log-SNR rises"):
        train_excess(pipe, excess(tmp_path))
    assert list(tmp_path.iterdir()) == []


# -- the command ----------------------------------------------------------------------------------


def test_the_command_trains_both(
    dit: Path,
    package: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = ["train", "exits", str(dit), "--iterations", "2", "--json"]
    short = ["--steps", "4", "--batch", "2", "--trajectories", "2"]
    with pytest.raises(SystemExit) as end:
        main([*line, "--out", str(tmp_path / "exits"), *short])
    assert not end.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["command"] == "train exits" and told["iterations"] == 2
    assert load_exits(tmp_path / "exits").kind == "excess"
    seen: list[FaithfulTraining] = []
    result = TrainingResult(out=tmp_path, seconds=1.0, losses=[0.5], captions=["bus"])
    monkeypatch.setattr(exits_faithful, "train_faithful", lambda s, _: seen.append(s) or result)
    more = ["--mode", "faithful", "--data", str(package), "--batch", "2", "--released"]
    with pytest.raises(SystemExit) as end:
        main([*line, "--out", str(tmp_path / "out"), *more])
    assert not end.value.code and json.loads(capsys.readouterr().out)["captions"] == 1
    assert seen[0].init == dit and seen[0].batch == 2
    assert all(getattr(seen[0], name) for name in SWITCHES)


def test_compare_and_generate_leave_early(
    dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = diffusers.DiffusionPipeline.from_pretrained(dit).transformer
    exits = ["--exits", str(write_exits(model, tmp_path, after=(1,)))]
    line = ["--model", str(dit), "--method", "early-exit", "--steps", "3", "--threshold", "9"]
    out = ["--out", str(tmp_path / "x.png"), "--json"]
    with pytest.raises(SystemExit) as end:
        main(["compare", "red fox face", "bus", *line, *exits, *out])
    plain, early = json.loads(capsys.readouterr().out)["results"]
    assert not end.value.code and (tmp_path / "x.png").exists()
    assert (plain["layers"], early["layers"]) == (None, 1.0)
    assert early["method"] == "early-exit" and early["nfe"] == 3 and early["psnr"] < 90
    for more, sentence in (
        ([*line], "--exits: expected the file that `sidestep train exits` wrote"),
        ([*line[:4], *exits, "--mode", "paper"], "EarlyExit: mode is 'paper', expected one of"),
        ([*line[:2], *exits], "--exits: got it with --method adaptive, expected early-exit"),
        (["--method", "early-exit", *exits], "UNet2DConditionModel: a UNet's blocks differ"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["generate", "bus", *more, "--out", str(tmp_path / "pictures")])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert end.value.code == 2 and sentence in error


def test_the_command_line_says_what_is_wrong(
    dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "x")]
    for more, sentence in (
        (["nowhere", *out], "--model: 'nowhere' is neither a bundled model"),
        (["emoji-sd", *out], "has no transformer to train exits of"),
        ([str(dit), *out, "--minutes", "3"], "--minutes: belongs to --mode faithful, got excess"),
        ([str(dit), *out, "--mode", "faithful", "--steps", "3"], "--steps: belongs to --mode exce"),
        ([str(dit), *out, "--mode", "faithful"], "--data: expected where the emoji-datasource"),
        ([str(dit), "--out", str(tmp_path / "no" / "x")], "--out: cannot write"),
        ([str(dit), *out, "--prompts", "nowhere.txt"], "--prompts: cannot read 'nowhere.txt'"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["train", "exits", *more])
        error = capsys.readouterr().err
        assert end.value.code == 2 and sentence in error and len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
