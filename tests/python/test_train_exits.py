"""`sidestep train exits`: the losses by hand, both trainings, what they write and refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
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
from sidestep.training.emoji_dit import TransformerTraining, train_transformer
from sidestep.training.emoji_run import TrainingResult
from sidestep.training.exits_excess import ExcessTraining, pipeline_runs, train_excess
from sidestep.training.exits_faithful import (
    EXITS,
    SWITCHES,
    FaithfulTraining,
    _fresh,
    adadiff_loss,
    by_token,
    train_faithful,
    uncertainties,
)
from sidestep.training.exits_fit import Fit, Learned
from sidestep.training.exits_losses import AdaDiffLoss, pinball
from sidestep.training.exits_measure import spearman
from sidestep.training.exits_record import Looking
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
    method = sidestep.EarlyExit(exits=tmp_path / "exits", threshold=1e9)
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
    pipe = build.tiny_dit(2)
    pipe.scheduler = diffusers.PNDMScheduler(**build.BETAS, skip_prk_steps=True)
    with pytest.raises(UserError, match="PNDMScheduler does not say how log-SNR rises"):
        train_excess(pipe, excess(tmp_path))
    assert list(tmp_path.iterdir()) == []


# -- AdaDiff --------------------------------------------------------------------------------------

Make = Callable[..., FaithfulTraining]


@pytest.fixture(scope="module")
def dit(package: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny emoji-dit that has learned a little."""
    out = tmp_path_factory.mktemp("models") / "dit"
    settings = TransformerTraining(
        out=out, data=package, init=tiny, batch=8, layers=3, heads=2, head_size=8, coloured=8,
        collages=8, iterations=40, lr=1e-2,
    )  # fmt: skip
    return train_transformer(settings).out


@pytest.fixture
def settings(package: Path, dit: Path, tmp_path: Path) -> Make:
    """Two iterations, but for the changes."""

    def make(**changes: Any) -> FaithfulTraining:
        values: dict[str, Any] = {
            "out": tmp_path / "out", "data": package, "init": dit, "batch": 4, "coloured": 8,
            "collages": 8, "iterations": 2,
        }  # fmt: skip
        return FaithfulTraining(**values | changes)

    return make


CALL = {"use_resolution_binning": False, "max_sequence_length": 24, "clean_caption": False}


def test_adadiff_trains_a_model_that_rows_leave(settings: Make, dit: Path) -> None:
    result = train_faithful(settings(iterations=40, batch=8, lr=3e-3))
    assert sum(result.losses[-10:]) < 0.9 * sum(result.losses[:10])
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (result.out / weights).read_bytes() != (dit / weights).read_bytes()
    assert "none; AdamW" in (result.out / "README.md").read_text()
    pipe = diffusers.DiffusionPipeline.from_pretrained(result.out)
    pipe.set_progress_bar_config(disable=True)
    exits = load_exits(result.out / EXITS)
    assert (exits.kind, exits.after, exits.probes.weight.shape) == ("faithful", (1, 2), (2, 1, 16))
    call = {**CALL, "guidance_scale": 7.5, "num_inference_steps": 3, "output_type": "latent"}
    for threshold, depths in ((0.0, (3.0, 3.0, 3.0)), (1.0, (3.0, 1.0, 1.0))):
        method = sidestep.EarlyExit(exits=result.out / EXITS, threshold=threshold)
        with sidestep.enable(pipe, method) as handle:
            pipe(["red fox face", "bus"], **call)
            assert handle.summary().layers == (depths, depths)


@pytest.mark.parametrize("map", [False, True])
def test_the_loss_is_its_formula(settings: Make, dit: Path, map: bool) -> None:
    """Layer by layer, picture by picture, without what makes it quick."""
    from tiny_adadiff import naive_loss, prepared

    run = settings(map=map, weigh_u=0.5, weigh_layers=2.0)
    model, data, captions, alphas = prepared(dit, run)
    looking = Looking(model)
    probes = _fresh(run, model, 2)
    probes = replace(
        probes, time=torch.randn(probes.time.shape), bias=torch.randn(probes.bias.shape)
    )
    with looking, torch.no_grad():
        ours = adadiff_loss(
            looking, probes, data, captions, alphas, run, torch.Generator().manual_seed(5)
        )
        theirs = naive_loss(looking, probes, data, captions, alphas, run)
    assert float(ours) == pytest.approx(theirs, rel=1e-4)


def test_the_score_is_the_mean_of_the_tokens(settings: Make, dit: Path) -> None:
    from sidestep.runtime.exits.modules import Probes

    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    probes = Probes(weight=rand(2, 3, 16), time=rand(2, 3, 16), bias=rand(2, 3))
    hidden, snr = rand(2, 4, 5, 16), rand(4)
    u = uncertainties(probes, hidden, snr)
    for layer in range(2):
        score = probes(layer, hidden[layer], snr, normalise=False)
        torch.testing.assert_close(u[layer].mean(1), score)


def test_a_run_that_goes_on_equals_one_that_never_stopped(settings: Make, tmp_path: Path) -> None:
    whole = train_faithful(settings(out=tmp_path / "whole", iterations=4))
    train_faithful(settings())
    with pytest.raises(UserError, match="there from an earlier run; resume it, or remove the fil"):
        train_faithful(settings())
    second = train_faithful(settings(iterations=4, resume=True))
    assert second.losses == whole.losses
    for file in (EXITS, "transformer/diffusion_pytorch_model.safetensors"):
        assert (second.out / file).read_bytes() == (whole.out / file).read_bytes()
    with pytest.raises(UserError, match="of a run with map False, expected True"):
        train_faithful(settings(map=True, resume=True))


def test_the_released_switches_change_what_is_learned(settings: Make, tmp_path: Path) -> None:
    plain = train_faithful(settings(iterations=3)).losses
    for name in SWITCHES:
        run = settings(out=tmp_path / name, iterations=3, **{name: True})
        result = train_faithful(run)
        assert result.losses != plain and np.isfinite(result.losses).all()
        probes = load_exits(result.out / EXITS).probes
        assert bool(probes.time.any()) == (name != "timeless")
        assert probes.weight.shape[1] == (16 if name == "map" else 1)
        assert name in (result.out / "README.md").read_text()


def test_what_adadiff_refuses(settings: Make, tiny: Path, dit: Path) -> None:
    with pytest.raises(UserError, match="not the pipeline folder to start from, it has no trans"):
        train_faithful(settings(init=tiny))
    with pytest.raises(UserError, match="out is the folder the training starts from"):
        train_faithful(settings(out=dit))
    with pytest.raises(UserError, match="weigh_u is -1, expected 0 or more"):
        settings(weigh_u=-1)


# -- the command ----------------------------------------------------------------------------------


def test_the_command_trains_both(
    dit: Path,
    package: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = ["train", "exits", str(dit), "--iterations", "2", "--json"]
    short = ["--steps", "2", "--batch", "2", "--trajectories", "2"]
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
