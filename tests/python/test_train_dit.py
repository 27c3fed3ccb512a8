"""`sidestep train emoji-dit`: the loss, the saved pipeline, going on, cooling down, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sidestep.cli import main
from sidestep.errors import UserError
from sidestep.training.checkpoint import read_checkpoint
from sidestep.training.emoji_dit import (
    Captions,
    TransformerTraining,
    build_transformer,
    denoising_loss,
    encode_captions,
    train_transformer,
)
from sidestep.training.emoji_folder import Encoded, draw, load_alphas, load_text_encoder
from sidestep.training.optimise import constant, cooling, cosine

CALL = {"use_resolution_binning": False, "max_sequence_length": 24, "clean_caption": False}


@pytest.fixture
def settings(package: Path, tiny: Path, tmp_path: Path) -> Callable[..., TransformerTraining]:
    """A run of two iterations of a tiny transformer, but for the changes."""

    def make(**changes: object) -> TransformerTraining:
        values: dict = {"out": tmp_path / "out", "data": package, "init": tiny, "batch": 4}
        values |= {"layers": 2, "heads": 2, "head_size": 8, "coloured": 8, "collages": 8}
        if not {"minutes", "cool_down"} & changes.keys():
            values["iterations"] = 2
        return TransformerTraining(**values | changes)

    return make


Make = Callable[..., TransformerTraining]


def test_the_folder_is_a_pipeline_that_generates(settings: Make, tiny: Path) -> None:
    from diffusers import DiffusionPipeline, PixArtTransformer2DModel

    run = settings()
    seen: list[tuple[int, float]] = []
    result = train_transformer(run, lambda i, done, *_: seen.append((i, done)))
    assert seen == [(1, 0.5), (2, 1.0)] and np.isfinite(result.losses).all()
    out = result.out
    assert not (out / "unet").exists() and not list(out.parent.glob(".out-*"))
    for kept in ("vae", "text_encoder", "scheduler", "tokenizer"):
        for file in (tiny / kept).iterdir():
            assert (out / kept / file.name).read_bytes() == file.read_bytes()
    assert (out / "captions-all.txt").read_text().splitlines() == result.captions
    card = (out / "README.md").read_text()
    assert "2 blocks of width 16" in card and "Apache-2.0" in card and "So far 2 iter" in card
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe).__name__ == "PixArtSigmaPipeline"
    assert isinstance(pipe.transformer, PixArtTransformer2DModel)
    assert pipe.transformer.dtype == torch.float32 and pipe.transformer.config.out_channels == 4
    again = out.parent / "again"
    pipe.save_pretrained(again)
    pictures = []
    for one in (pipe, DiffusionPipeline.from_pretrained(again)):
        one.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        call = {**CALL, "guidance_scale": 7.5, "num_inference_steps": 2, "output_type": "np"}
        pictures.append(one(["red fox face", "bus"], generator=noise, **call).images)
    assert pictures[0].shape == (2, 64, 64, 3) and np.isfinite(pictures[0]).all()
    np.testing.assert_array_equal(pictures[0], pictures[1])


def test_the_loss_falls(settings: Make) -> None:
    losses = train_transformer(settings(iterations=60, batch=8, lr=1e-2)).losses
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def test_a_run_that_goes_on_equals_one_that_never_stopped(settings: Make, tmp_path: Path) -> None:
    whole = train_transformer(settings(out=tmp_path / "whole", iterations=5, resume=True))
    first = train_transformer(settings(iterations=2))
    assert len(first.losses) == 2
    seen: list[int] = []
    second = train_transformer(settings(iterations=5, resume=True), lambda i, *_: seen.append(i))
    assert seen == [3, 4, 5] and second.losses == whole.losses
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (second.out / weights).read_bytes() == (whole.out / weights).read_bytes()
    again = train_transformer(settings(iterations=5, resume=True))
    assert again.losses == whole.losses
    other = train_transformer(settings(out=tmp_path / "other", iterations=5, seed=1))
    assert other.losses != whole.losses


def test_a_killed_run_goes_on_from_its_last_checkpoint(settings: Make, tmp_path: Path) -> None:
    def killed(iteration: int, *_: float) -> None:
        if iteration == 3:
            raise KeyboardInterrupt

    run = settings(iterations=4, checkpoint_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        train_transformer(run, killed)
    assert len(read_checkpoint(tmp_path / "out.checkpoint", {"layers": 2})["losses"]) == 2
    assert "So far 2 iterations" in (tmp_path / "out" / "README.md").read_text()
    seen: list[int] = []
    train_transformer(replace(run, resume=True), lambda i, *_: seen.append(i))
    assert seen == [3, 4]


def test_a_cool_down_takes_the_rate_to_zero_and_leaves_the_run(
    settings: Make, tmp_path: Path
) -> None:
    trunk = train_transformer(settings(iterations=60, batch=2))
    kept = (tmp_path / "out.checkpoint").read_bytes()
    seen: list[tuple[int, float]] = []

    def note(iteration: int, _done: float, _loss: float, rate: float) -> None:
        seen.append((iteration, rate / run.lr))
        if len(seen) == 3:
            raise KeyboardInterrupt

    run = settings(cool_down=4, batch=2, checkpoint_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        train_transformer(run, note)
    result = train_transformer(replace(run, resume=True), note)
    assert [iteration for iteration, _ in seen] == [61, 62, 63, 63, 64]
    assert [rate for _, rate in seen] == pytest.approx([1, 0.75, 0.5, 0.5, 0.25])
    assert result.losses[:60] == trunk.losses and len(result.losses) == 64
    assert (tmp_path / "out.checkpoint").read_bytes() == kept
    assert "then to 0 over 4 iterations" in (tmp_path / "out" / "README.md").read_text()


def test_schedules() -> None:
    assert [cosine(7, done) for done in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert constant(7, 0.5) == 1
    assert [cooling(10, 14)(i, 0.1) for i in (10, 11, 14)] == [1, 0.75, 0]


def test_captions_are_encoded_as_the_pipeline_encodes_them(settings: Make, tiny: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(train_transformer(settings()).out)
    said = ["red fox face", "bus", "red fox face", ""]
    expected, mask, *_ = pipe.encode_prompt(
        said, do_classifier_free_guidance=False, max_sequence_length=24, clean_caption=False
    )
    tokens = pipe.tokenizer(said, padding="max_length", return_tensors="pt").input_ids
    data = Encoded(
        latents=torch.zeros(3, 4, 16, 16), tokens=tokens[:3], empty=tokens[3], weights=torch.ones(3)
    )
    captions = encode_captions(load_text_encoder(tiny), data)
    length = captions.mask.shape[1]
    assert captions.states.shape == (3, length, 16) and length == int(mask.sum(1).max())
    rows = [*captions.index.tolist(), captions.empty]
    assert rows[0] == rows[2] and len(set(rows)) == 3
    torch.testing.assert_close(captions.mask[rows], mask[:, :length].float())
    kept = mask[:, :length].bool()
    torch.testing.assert_close(captions.states[rows][kept], expected[:, :length][kept])


def test_the_loss_is_its_formula(tiny: Path) -> None:
    class Half(torch.nn.Module):
        """Predicts one half everywhere, and notes which captions it was given."""

        def forward(self, x: torch.Tensor, text: torch.Tensor, **given: torch.Tensor) -> object:
            self.said, self.mask = text[:, 0, 0], given["encoder_attention_mask"]
            return type("Output", (), {"sample": torch.full_like(x, 0.5)})

    alphas = load_alphas(tiny)
    data = Encoded(
        latents=torch.randn(3, 4, 2, 2), tokens=torch.zeros(3, 2).long(),
        empty=torch.zeros(2).long(), weights=torch.ones(3),
    )  # fmt: skip
    captions = Captions(
        states=torch.tensor([7.0, 8.0, 9.0])[:, None, None].repeat(1, 4, 5),
        mask=torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]),
        index=torch.tensor([1, 0, 1]),
        empty=2,
    )
    model = Half()
    loss = denoising_loss(model, data, captions, alphas, 64, torch.Generator().manual_seed(5))
    drawn = draw(data, alphas, 64, torch.Generator().manual_seed(5))
    a = alphas[drawn.t].double()
    weight = torch.minimum(a / (1 - a), torch.tensor(5.0)) * (1 - a) / a
    errors = (drawn.noise.double() - 0.5).square().flatten(1).mean(1)
    assert float(loss) == pytest.approx(float((weight * errors).mean()), rel=1e-5)
    said = torch.where(drawn.dropped[:, 0], 9.0, torch.tensor([8.0, 7.0, 8.0])[drawn.rows])
    assert torch.equal(model.said, said) and 0 < int(drawn.dropped.sum()) < 20
    assert model.mask.shape == (64, 3)


def test_bf16_is_for_the_products_of_matrices_only(tiny: Path) -> None:
    run = TransformerTraining(out="out", data="data", iterations=1, layers=2, heads=1, head_size=16)
    torch.manual_seed(0)
    model = build_transformer(run, (4, 8, 8), 16)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    data = Encoded(
        latents=torch.randn(3, 4, 8, 8), tokens=torch.zeros(3, 2).long(),
        empty=torch.zeros(2).long(), weights=torch.ones(3),
    )  # fmt: skip
    captions = Captions(
        states=torch.randn(3, 4, 16), mask=torch.ones(3, 4), index=torch.arange(3), empty=2
    )

    def made(bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        generator = torch.Generator().manual_seed(5)
        loss = denoising_loss(model, data, captions, load_alphas(tiny), 8, generator, bf16=bf16)
        loss.backward()
        return loss.detach(), model.proj_out.weight.grad.clone()

    (exact, slope), (rounded, rounded_slope) = made(False), made(True)
    assert rounded.dtype == rounded_slope.dtype == torch.float32 and rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=0)
    assert float((rounded_slope - slope).norm() / slope.norm()) < 0.02


def test_a_fresh_transformer_predicts_zero_and_fits_the_bundle() -> None:
    run = TransformerTraining(out="out", data="data", iterations=1)
    model = build_transformer(run, (4, 16, 16), 192)
    assert len(model.transformer_blocks) == 14 and model.inner_dim == 168
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_675_496
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        output = model(x, torch.randn(2, 3, 192), timestep=torch.tensor([1, 999])).sample
    assert output.shape == x.shape and not output.any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"iterations": None}, "exactly one of minutes and iterations and cool_down"),
        ({"iterations": 5, "cool_down": 5}, "exactly one of minutes and iterations and cool_down"),
        ({"cool_down": 0}, "cool_down is 0, expected a number above 0"),
        ({"heads": 0}, "heads is 0, expected a number above 0"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"ema": 1.0}, "ema is 1.0, expected at least 0 and below 1"),
    ],
)
def test_bad_settings_are_refused(settings: Make, changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        settings(**changes)


def test_checkpoints_that_do_not_fit_are_refused(settings: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"out\.checkpoint: no such file; there is no run whose"):
        train_transformer(settings(cool_down=2))
    train_transformer(settings())
    with pytest.raises(UserError, match="there from an earlier run; resume it, or remove the file"):
        train_transformer(settings())
    with pytest.raises(UserError, match="of a run with layers 2, expected 3; use the same"):
        train_transformer(settings(resume=True, layers=3))
    kept = tmp_path / "out.checkpoint"
    torch.save({"settings": {}}, kept)
    with pytest.raises(UserError, match="not a checkpoint of a training run"):
        train_transformer(settings(resume=True))
    kept.write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"out\.checkpoint: cannot read it as a checkpoint"):
        train_transformer(settings(resume=True))


def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "emoji-dit", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    for more, sentence in (
        (["--iterations", "1"], "npm pack emoji-datasource-google@16.0.0"),
        (["--cool-down", "9"], "out.checkpoint: no such file"),
        (["--minutes", "1", "--cool-down", "9"], "expected exactly one of minutes"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*line, *more])
        error = capsys.readouterr().err
        assert end.value.code == 2 and sentence in error and len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
