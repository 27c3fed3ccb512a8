"""`sidestep bench exits`: its distances, its choices and its peers by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_exits import MODELS, CountBlocks, generate, random_exits, write_exits
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

import sidestep
from sidestep.bench import exits_peers as peers
from sidestep.bench.exits_grid import (
    Planned,
    Policy,
    equal_cost,
    fewer_steps,
    policies,
)
from sidestep.bench.exits_oracle import Seen, gate, look, oracle, rank, static, verdict
from sidestep.bench.frechet import Features, frechet_distance
from sidestep.models import load_pipeline
from sidestep.runtime.exits.file import save_exits
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.early_exit import EarlyExit

PROMPTS = ["red fox face", "bus", "octopus", "blue heart"]


def test_frechet_distance_of_two_gaussians() -> None:
    # Mean (0, 0), variances 4 and 1; mean (3, 4), variances 1 and 9: 25 + (2-1)^2 + (1-3)^2.
    spread = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * (3 / 4) ** 0.5
    a = spread * torch.tensor([2.0, 1.0])
    b = spread * torch.tensor([1.0, 3.0]) + torch.tensor([3.0, 4.0])
    assert frechet_distance(a, b) == pytest.approx(30)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    # A rotation changes nothing where both are turned.
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(30)
    with pytest.raises(ValueError, match=r"got shape \[1, 2\], expected \[2 or more, D\]"):
        frechet_distance(a[:1], b)


class Flat(nn.Module):
    """Features that are given."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def theirs(a: torch.Tensor, b: torch.Tensor) -> float:
    metric = FrechetInceptionDistance(feature=Flat(a.shape[1]))
    metric.update(a, real=True)
    metric.update(b, real=False)
    return float(metric.compute())


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 5, generator=generator).double() for _ in range(2))
    b = b @ torch.rand(5, 5, generator=generator).double()
    assert frechet_distance(a, b) == pytest.approx(theirs(a, b), rel=1e-9)


def test_frechet_distance_of_fewer_pictures_than_features() -> None:
    """Two sets that a shift and a scale tell apart: by hand. torchmetrics' is mostly rounding."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 40, generator=generator) @ torch.randn(40, 192, generator=generator)
    a = (a + 0.1 * torch.randn(64, 192, generator=generator) + 5).double()
    assert abs(frechet_distance(a, a)) < 1e-10 and theirs(a, a) < -1e-4
    scale, shift = 1.001, 1e-3
    b = (a - a.mean(0)) * scale + a.mean(0) + shift
    expected = 192 * shift**2 + (scale - 1) ** 2 * float(a.var(0).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert theirs(a, b) < 0.99 * expected


def test_features_tell_pictures_apart() -> None:
    features = Features()
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = features(images)
    assert found.shape == (6, 192) and found.dtype == torch.float64
    assert torch.allclose(features(images[2:4]), found[2:4], atol=1e-5)
    assert features(images[:, :, ::2, ::2]).shape == (6, 192)
    near = features((images + 0.01).clamp(0, 1))
    assert frechet_distance(found, near) < 0.1 * frechet_distance(found, features(1 - images**4))


def test_equal_cost() -> None:
    assert [equal_cost(share, 50) for share in (1.0, 0.5, 0.333, 0.001)] == [50, 25, 17, 1]
    made = fewer_steps([0.5, 0.52, 0.3, 0.99], 10)
    assert [(p.label, p.steps) for p in made] == [("5 steps", 5), ("3 steps", 3)]


def test_policies(tmp_path: Path) -> None:
    model = MODELS["PixArtTransformer2DModel"][0]().transformer
    exits, faithful = write_exits(model, tmp_path), tmp_path / "faithful"
    save_exits(random_exits(model, after=(1, 2, 3, 4), kind="faithful"), faithful)

    def made(family: str, other: Path | None = None) -> list[Policy]:
        return policies(family, 4, exits, (0.1, 0.2), other)

    assert [p.method for p in made("static")] == [
        EarlyExit(exits=exits, threshold=0.1),
        EarlyExit(exits=exits, threshold=0.2),
    ]
    both = made("sample+adaptive")[1]
    reuse = Adaptive(mode="error-control")
    assert both.method == EarlyExit(exits=exits, mode="sample", threshold=0.2, reuse=reuse)
    assert (both.label, both.threshold) == ("0.2", 0.2)
    assert [p.method.plan for p in made("fixed-exit")] == [((0,) * 4,), ((1,) * 4,)]  # type: ignore[union-attr]
    assert [p.label for p in made("fixed-exit")] == ["block 1", "block 3"]
    assert Adaptive() in [p.method for p in made("adaptive")] and len(made("adaptive")) == 5
    assert made("adadiff") == []
    assert {p.method.mode for p in made("adadiff", faithful)} == {"adadiff"}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="rows of equal length that begin at the same exit"):
        Planned(exits=exits, plan=((0, 1), (1, 1)))


def seen(errors: np.ndarray, foretold: np.ndarray | None = None) -> Seen:
    told = np.log(errors) if foretold is None else foretold
    return Seen(errors=errors, foretold=told, weights=np.ones(errors.shape[1]), depths=(2, 5))


def test_the_oracle_takes_the_rows_that_lose_least() -> None:
    # Two rows, three steps, one exit after 2 of 5 blocks; both rows leave at the first step.
    errors = np.array([[0.1, 0.1, 0.4], [0.3, 0.9, 0.2]])[..., None]
    damages = seen(errors).damages
    assert damages.shape == (2, 3, 2) and (damages[..., 1] == 0).all()
    # 2 * 0.36 = 0.1 + 0.3 at first, and 0.32 that 0.1 and 0.2 fit in.
    plan = oracle(damages, (2, 5), 0, 0.36)
    assert plan.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert oracle(damages, (2, 5), 1, 0.36).tolist() == [[1, 0, 0], [1, 1, 0]]
    assert oracle(damages, (2, 5), 0, 0.1).tolist() == [[0, 1, 1], [0, 1, 1]]
    # All rows alike: means 0.2, 0.5, 0.3.
    assert static(damages, (2, 5), 0.36) == [0, 1, 1]
    assert static(damages, (2, 5), 0.51) == [0, 1, 0]


def test_the_oracle_is_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        damages = np.sort(rng.random((2, 3, 3)))[..., ::-1] * [1, 1, 0]
        cost = np.array([1, 3, 4])
        found = oracle(damages, (1, 3, 4), 2, 0.8)
        spent = np.take_along_axis(damages, found[..., None], 2).sum() / 2
        assert spent <= 0.8
        cheapest = min(
            cost[list(choice)].sum()
            for choice in itertools.product(range(3), repeat=4)
            if damages[[0, 0, 1, 1], [1, 2, 1, 2], list(choice)].sum() / 2 <= spent + 1e-12
        )
        assert cost[found[:, 1:]].sum() == cheapest  # of plans that lose no more


def test_the_gate() -> None:
    errors = np.array([[0.1, 0.1, 0.4], [0.3, 0.9, 0.2]])[..., None]
    (entry,) = gate(seen(errors), [0.51])
    # Static leaves at the first and last step: depth (2 + 5 + 2) / 3, damage (0.5 + 0.5) / 2.
    assert entry["layers_static"] == pytest.approx(3) and entry["damage"] == pytest.approx(0.5)
    # For that damage the oracle, beside the first step, takes 0.1 and 0.2 but not 0.4.
    assert entry["layers_oracle"] == pytest.approx((2 * 4 + 5 * 2) / 6)
    assert entry["saving"] == pytest.approx(0) and not entry["passed"]
    assert entry["rank"] == pytest.approx(1)
    # Row 0 can leave anywhere. Static: the first two steps, at 0.1 + 0.5; the next costs 0.525.
    apart = np.array([[0.1, 0.1, 0.1, 0.1], [0.1, 0.9, 0.95, 1.0]])[..., None]
    (entry,) = gate(seen(apart), [0.65])
    assert (entry["layers_static"], entry["damage"]) == (3.5, pytest.approx(0.6))
    assert entry["layers_oracle"] == pytest.approx((2 * 5 + 5 * 3) / 8)
    assert entry["saving"] == pytest.approx(1 - 3.125 / 3.5) and entry["passed"]
    (entry,) = gate(seen(apart, -apart), [0.65])
    assert entry["rank"] < 0 and not entry["passed"]
    assert verdict([{"passed": True}]) == "sample"
    assert verdict([{"passed": True}, {"passed": False}]) == verdict([]) == "static"


def test_rank_is_within_the_steps() -> None:
    errors = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])[..., None]
    assert rank(seen(errors)) == pytest.approx(1)
    only_time = np.broadcast_to(np.array([[0.0, 1.0]]), (3, 2))[..., None]
    backwards = only_time - errors / 100  # knows the step, and the rows the wrong way round
    assert rank(seen(errors, backwards)) == pytest.approx(-1)


@pytest.fixture(scope="module")
def exits(dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformer = diffusers.DiffusionPipeline.from_pretrained(dit).transformer
    return write_exits(transformer, tmp_path_factory.mktemp("exits"), after=(1, 2))


def test_looking_sees_what_leaving_does(dit: Path, exits: Path) -> None:
    pipe = load_pipeline(str(dit))
    file = EarlyExit(exits=exits).file()
    arguments: dict[str, Any] = {"steps": 3, "guidance": 4.0, "seed": 5}
    found = look(pipe, file, PROMPTS[:3], batch=2, **arguments)
    assert found.errors.shape == found.foretold.shape == (3, 3, 2)
    assert found.depths == (1, 2, 3) and (found.errors > 0).all() and (found.weights > 0).all()
    alone = look(pipe, file, PROMPTS[:1], batch=2, **arguments)
    # Hidden states are kept in bfloat16.
    np.testing.assert_allclose(alone.errors, found.first(1).errors, rtol=2e-2)
    assert type(pipe.transformer) is diffusers.PixArtTransformer2DModel


def test_rows_leave_as_planned(tmp_path: Path) -> None:
    name = "PixArtTransformer2DModel"
    pipe = MODELS[name][0]()
    exits = write_exits(pipe.transformer, tmp_path)
    count = CountBlocks(pipe.transformer)
    plan = ((2, 0, 2), (2, 1, 0))  # exits after blocks 1 and 3 of 5
    with sidestep.enable(pipe, Planned(exits=exits, plan=plan)) as handle:
        generate(pipe, name, [1, 2], steps=3)
        assert handle.summary().layers == ((5, 1, 5), (5, 3, 1))
    assert count.calls == [[4] * 5, [4, 2, 2], [4, 2, 2, 2, 2]]
    with sidestep.enable(pipe, Planned(exits=exits, plan=((1,) * 3,))) as handle:
        generate(pipe, name, [1, 2], steps=3)
        assert handle.summary().layers == ((3, 3, 3),) * 2


def test_first_block_cache_is_counted_and_taken_off() -> None:
    name = "PixArtTransformer2DModel"
    pipe = MODELS[name][0]()
    before = generate(pipe, name, [1, 2])
    with peers.first_block_cache(pipe.transformer, 0.0) as counted:
        generate(pipe, name, [1], steps=1)  # warms up
        assert torch.equal(generate(pipe, name, [1, 2]), before)
    assert (counted.calls, counted.run, counted.depth) == ([1, 6], [5, 30], 5)
    with peers.first_block_cache(pipe.transformer, 1e9) as counted:
        generate(pipe, name, [1], steps=1)
        for _ in range(2):  # a new generation finds nothing of the one before
            assert not torch.equal(generate(pipe, name, [1, 2]), before)
    assert (counted.calls, counted.run, counted.depth) == ([1, 6, 6], [5, 10, 10], 10 / 6)
    assert torch.equal(generate(pipe, name, [1, 2]), before)
    assert not any(hasattr(part, "_diffusers_hook") for part in pipe.transformer.modules())
    assert [peers.reason(MODELS[other][0]().transformer) for other in MODELS] == [""] * 4
    assert "UNet" in peers.reason(load_pipeline("emoji-sd").unet)
