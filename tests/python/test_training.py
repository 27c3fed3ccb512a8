"""Training of the bundled model: pictures, held-out prompts, settings, loop and saved folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_emoji import HELD_OUT, NAMES

from sidestep.errors import UserError
from sidestep.training.average import Average
from sidestep.training.emoji_codec import (
    CodecTraining,
    load_pictures,
    reconstruction_loss,
    train_codec,
)
from sidestep.training.emoji_data import (
    PALETTE,
    Emoji,
    HeldOut,
    load_emoji,
    mean_colour,
    moved,
    on_white,
    place,
    recolour,
)
from sidestep.training.emoji_mix import Mix, build_examples
from sidestep.training.emoji_sd import EmojiTraining, train


@pytest.fixture(scope="module")
def emoji(package: Path) -> list[Emoji]:
    """The six emoji of the package above."""
    return load_emoji(package)


def settings(package: Path, tiny: Path, out: Path, **changes: object) -> EmojiTraining:
    """A run of two iterations on the tiny pipeline, but for the changes."""
    values: dict = {"iterations": 2, "batch": 4, "coloured": 8, "collages": 8} | changes
    return EmojiTraining(out=out, data=package, init=tiny, **values)


def test_package_is_read_with_names_aliases_and_pictures(emoji: list[Emoji]) -> None:
    assert [one.name for one in emoji] == list(NAMES)
    assert emoji[1].aliases == ("tiger",)
    assert emoji[2].aliases == ()
    np.testing.assert_allclose(emoji[0].picture[32, 32], [0xE8 / 255, 0x77 / 255, 0x22 / 255, 1])
    assert on_white(emoji[0].picture)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("caption", "given_away"),
    [
        ("blue tiger face", True),
        ("blue tiger", True),
        ("Blue Tiger Face with bus", True),
        ("octopus with bicycle", True),
        ("smiling bus", True),
        ("tiger face", False),
        ("red tiger face", False),
        ("blue octopus", False),
        ("octopus on a bus", False),
    ],
)
def test_held_out_prompts_are_recognised_by_their_words(caption: str, given_away: bool) -> None:
    assert HeldOut(HELD_OUT).gives_away(caption) is given_away


def test_held_out_prompts_are_recognised_behind_aliases(emoji: list[Emoji]) -> None:
    held_out = HeldOut(HELD_OUT)
    octopus, bicycle, bus = emoji[2], emoji[4], emoji[3]
    assert held_out.gives_away("octopus on a bike", [octopus, bicycle])
    assert not held_out.gives_away("octopus on a bike", [octopus])
    assert not held_out.gives_away("octopus on a bus", [octopus, bus])


def test_one_left_over_word_keeps_face() -> None:
    held_out = HeldOut(["lemon face"])
    assert not held_out.gives_away("lemon")
    assert held_out.gives_away("lemon with face")


@pytest.mark.parametrize("colour", PALETTE)
def test_recolour_gives_the_named_colour_and_keeps_alpha(emoji: list[Emoji], colour: str) -> None:
    for one in (emoji[0], emoji[4]):  # saturated orange, and grey
        painted = recolour(one.picture, colour)
        assert mean_colour(painted) == colour
        np.testing.assert_array_equal(painted[..., 3], one.picture[..., 3])
    np.testing.assert_allclose(painted[32, 32, :3], PALETTE[colour], atol=2e-3)


def test_place_and_move_keep_the_picture_inside(emoji: list[Emoji]) -> None:
    canvas = np.zeros((64, 64, 4), np.float32)
    place(canvas, emoji[3].picture, 32, 32, 0)
    assert canvas[:, :32, 3].max() == 0 and canvas[16, 48, 3] == 1
    np.testing.assert_allclose(canvas[16, 48, :3], emoji[3].picture[32, 32, :3], atol=0.005)
    shifted = moved(emoji[3].picture, np.random.default_rng(0))
    assert 0.5 < shifted[..., 3].sum() / emoji[3].picture[..., 3].sum() <= 1.01


def test_examples_hold_every_group_and_no_held_out_prompt(emoji: list[Emoji]) -> None:
    held_out = HeldOut(HELD_OUT)
    mix = Mix(held_out=held_out, focus=frozenset({"bus"}), coloured=40, collages=40, seed=3)
    examples = build_examples(emoji, mix)
    groups = [example.group for example in examples]
    counted = {group: groups.count(group) for group in set(groups)}
    assert counted == {"plain": 6, "moved": 12, "coloured": 40, "collage": 40}
    assert not any(held_out.gives_away(example.caption) for example in examples)
    assert {example.caption for example in examples if example.focus} == {"bus"}
    assert all(example.picture.shape == (64, 64, 3) for example in examples)
    again = build_examples(emoji, mix)
    assert [one.caption for one in again] == [one.caption for one in examples]
    assert all((a.picture == b.picture).all() for a, b in zip(again, examples, strict=True))


def test_too_few_emoji_for_the_compositions_are_refused(emoji: list[Emoji]) -> None:
    with pytest.raises(UserError, match="allow only 0 collage pictures, expected 5"):
        build_examples(emoji[:1], Mix(held_out=HeldOut([]), coloured=0, collages=5))
    with pytest.raises(UserError, match="no emoji that is not held out"):
        build_examples([], Mix(held_out=HeldOut([]), coloured=0, collages=0))


def test_training_is_deterministic_and_the_folder_loads(
    package: Path, tiny: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    seen: list[tuple[int, float]] = []
    first = train(settings(package, tiny, tmp_path / "a"), lambda i, d, *_: seen.append((i, d)))
    second = train(settings(package, tiny, tmp_path / "b"))
    other = train(settings(package, tiny, tmp_path / "c", seed=1))
    assert seen == [(1, 0.5), (2, 1.0)]
    assert first.losses == second.losses != other.losses
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "c" / weights).read_bytes()
    for kept in ("vae/config.json", "unet/config.json", "captions.txt", "compositions.txt"):
        assert (tmp_path / "a" / kept).read_bytes() == (tiny / kept).read_bytes()
    assert (tmp_path / "a" / "captions-all.txt").read_text().splitlines() == first.captions
    assert "Apache-2.0" in (tmp_path / "a" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "a", safety_checker=None)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float32
    image = pipe("red fox face", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()


def test_loss_falls_from_scratch(package: Path, tiny: Path, tmp_path: Path) -> None:
    run = settings(package, tiny, tmp_path / "out", iterations=60, from_scratch=True, lr=1e-2)
    losses = train(run).losses
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def test_time_ends_a_run_and_an_earlier_run_is_replaced(
    package: Path, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(settings(package, tiny, out))
    (out / "stale.txt").write_text("of the earlier run")
    result = train(settings(package, tiny, out, iterations=None, minutes=1e-6))
    assert len(result.losses) == 1
    assert not (out / "stale.txt").exists() and (out / "model_index.json").is_file()


def test_average_follows_and_swaps_back() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = Average([parameter], decay=0.5)
    for value in (1.0, 2.0):
        with torch.no_grad():
            parameter.fill_(value)
        average.update()
    # decays 1/11 and 2/12: 10/11, then 10/11 / 6 + 2 * 5/6
    with average.swapped_in():
        torch.testing.assert_close(parameter.detach(), torch.full((2,), 10 / 66 + 10 / 6))
    assert parameter.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"iterations": None}, "exactly one of minutes and iterations"),
        ({"minutes": 3.0}, "exactly one of minutes and iterations"),
        ({"batch": 0}, "batch is 0, expected a number above 0"),
        ({"lr": float("nan")}, "lr is nan, expected a number above 0"),
        ({"collages": -1}, "collages is -1, expected 0 or more"),
        ({"ema": 1.0}, "ema is 1.0, expected at least 0 and below 1"),
    ],
)
def test_bad_settings_are_refused(changes: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        settings(tmp_path, tmp_path, tmp_path / "out", **changes)


def test_bad_folders_are_refused_and_nothing_is_written(
    package: Path, tiny: Path, tmp_path: Path
) -> None:
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    with pytest.raises(UserError, match=r"npm pack emoji-datasource-google@16\.0\.0"):
        train(settings(empty, tiny, out))
    with pytest.raises(UserError, match="not the pipeline folder to start from, it has no"):
        train(settings(package, empty, out))
    with pytest.raises(UserError, match="exists and is not a pipeline folder"):
        train(settings(package, tiny, empty))
    with pytest.raises(UserError, match="out is the folder the training starts from"):
        train(settings(package, tiny, tiny))
    with pytest.raises(UserError, match="does not exist or cannot be written"):
        train(settings(package, tiny, tmp_path / "no" / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_unreadable_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "img" / "google" / "64").mkdir(parents=True)
    (tmp_path / "emoji.json").write_text("{not json")
    with pytest.raises(UserError, match="cannot read the emoji package"):
        load_emoji(tmp_path)


def test_the_codec_learns_and_the_rest_follows(package: Path, tiny: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny, StableDiffusionPipeline

    out = tmp_path / "codec"
    run = CodecTraining(out=out, data=package, init=tiny, iterations=60, batch=6, lr=5e-3)
    result = train_codec(run)
    assert sum(result.losses[-5:]) < 0.7 * sum(result.losses[:5])
    vae = AutoencoderTiny.from_pretrained(out, subfolder="vae")
    x = load_pictures(package).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(x).latents
        restored = vae.decode(latents).sample.clamp(-1, 1)
    assert float(latents.std()) * vae.config.scaling_factor == pytest.approx(1, rel=0.02)
    error = float(((restored - x) / 2).square().mean((1, 2, 3)).mean())
    assert -10 * np.log10(error) == pytest.approx(result.psnr, abs=0.1)
    pipe = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    tokens = pipe.tokenizer("fox face", padding="max_length").input_ids
    assert tokens[0] == 0 and tokens[-1] == 1 and len(tokens) == 24
    assert (out / "compositions.txt").read_text() == (tiny / "compositions.txt").read_text()
    unet = EmojiTraining(
        out=tmp_path / "model", data=package, init=out, from_scratch=True, iterations=2, batch=4,
        coloured=8, collages=8,
    )  # fmt: skip
    assert len(train(unet).losses) == 2
    again = AutoencoderTiny.from_pretrained(tmp_path / "model", subfolder="vae")
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))


def test_the_codec_is_the_same_for_the_same_seed(package: Path, tiny: Path, tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run = CodecTraining(
            out=tmp_path / name, data=package, init=tiny, iterations=3, batch=2, seed=seed
        )
        losses.append(train_codec(run).losses)
    assert losses[0] == losses[1] != losses[2]


def test_the_loss_is_its_formula() -> None:
    class Same(torch.nn.Module):
        """Latents are the pictures; the decoder adds 0.5 to one column."""

        def encoder(self, x: torch.Tensor) -> torch.Tensor:
            return x * 4

        def decoder(self, z: torch.Tensor) -> torch.Tensor:
            out = self.kept.clone()
            out[..., 0] += 0.5
            return out

    coder = Same()
    coder.kept = x = torch.full((1, 1, 2, 4), 1.0)
    loss = reconstruction_loss(coder, x, torch.Generator().manual_seed(0))
    l1, mse, across, outside = 0.5 / 4, 0.25 / 4, 0.5 / 3, 1.0
    assert float(loss) == pytest.approx(l1 + 0.5 * 0.5 * across + mse + 0.1 * outside)


def test_pictures_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no emoji package is unpacked below it"):
        load_pictures(tmp_path)
