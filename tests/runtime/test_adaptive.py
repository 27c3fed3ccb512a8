"""`Adaptive`: the published estimator, compared with an independent transcription of it."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criteria import CRITERIA
from sidestep.runtime.methods.criterion import Course, Observation

NOTHING = torch.empty(0)  # the latents: the published criterion needs their step sizes only
PRESETS = [(0.01, 4), (0.004, 6), (0.008, 4)]
OTHERS = [(0.05, 1), (0.02, 2), (0.01, 3), (0.0, 4), (1 / 128, 4)]


def published(deltas: list[np.float32], tau: float, cap: int) -> list[bool]:
    """The published program on one image: which of the N steps call the model.

    Transcribed from the description in facts/adaptive_diffusion.md 1.1, in its order and with its
    lists. deltas[k] = mean |x_{k+1} - x_k|; arithmetic in float32.
    """
    tau = np.float32(tau)
    called, window, mask = [], [], []
    for k, delta in enumerate(deltas):
        called.append(k < 4 or mask[-1])
        if k in (1, 2):
            window.append(delta)
        if k >= 3:
            window.append(delta)
            if len(mask) > 4 and not any(mask[-cap:]):
                mask.append(True)
            else:
                xi = abs((window[-1] + window[-3]) / np.float32(2) - window[-2])
                mask.append(not xi <= tau * window[-2])
    return called


def decide(deltas: torch.Tensor, tau: float, cap: int) -> torch.Tensor:
    """Ours: which of the N steps call the model, [rows, N], from step sizes [N, rows]."""
    criterion = Adaptive(mode="paper", threshold=tau, max_skip=cap).criterion()
    criterion.start(Course(rows=deltas.shape[1], steps=len(deltas)))
    called = [[True] * deltas.shape[1]]
    for k, delta in enumerate(deltas):
        called.append(criterion.observe(sizes_only(k, delta, called[-1])).compute)
    return torch.tensor(called[: len(deltas)]).T


def sizes_only(step: int, delta: torch.Tensor, computed: list[bool]) -> Observation:
    return Observation(
        step=step, x=NOTHING, x_next=NOTHING, output=None, computed=computed, step_sizes=delta
    )


def random_walks(kind: str, steps: int, rows: int) -> torch.Tensor:
    """Step sizes [steps, rows] fp32 whose decisions are mixed, all skips, or on the edge."""
    generator = torch.Generator().manual_seed(len(kind) + steps)
    unit = torch.rand(steps, rows, generator=generator)
    if kind == "noise":
        return unit
    if kind == "smooth":  # xi / delta spread around the presets' thresholds
        return 1 + 0.05 * (unit - 0.5).cumsum(0)
    if kind == "trend":
        line = torch.linspace(2, 0.5, steps)[:, None]
        return line * (1 + 0.03 * (unit - 0.5) * torch.linspace(0, 1, rows))
    if kind == "constant":
        return torch.full((steps, rows), 0.125)
    if kind == "zero":
        return torch.zeros(steps, rows)
    if kind == "bursts":  # calm stretches of every length between two jumps
        return torch.where(unit < 0.15, 2.0, 1.0)
    assert kind == "edge"  # exact binary fractions: xi is often exactly delta / 128
    return 1 + torch.randint(0, 3, (steps, rows), generator=generator) / 64


KINDS = ["noise", "smooth", "trend", "constant", "zero", "bursts", "edge"]


@pytest.mark.parametrize("tau, cap", [*PRESETS, *OTHERS])
@pytest.mark.parametrize("kind", KINDS)
def test_decisions_equal_the_published_program(kind: str, tau: float, cap: int) -> None:
    for steps in (1, 4, 5, 10, 50):
        deltas = random_walks(kind, steps, rows=8)
        ours = decide(deltas, tau, cap)
        for row in range(8):
            expected = published(list(deltas[:, row].numpy()), tau, cap)
            assert ours[row].tolist() == expected, (kind, steps, row)


def test_the_test_sequences_are_not_trivial() -> None:
    called = decide(random_walks("smooth", 50, 24), 0.01, 4).float().mean(1)
    assert 0.3 < called.min() and called.max() < 1 and called.unique().numel() > 5


def test_equality_skips() -> None:
    edge = 1 / 128
    deltas = torch.tensor([[1.0], [1.0], [1.0], [1.0 + 2 * edge], [1.0]])  # xi = edge * delta
    assert decide(deltas, edge, 4)[0].tolist() == [True, True, True, True, False]
    below = float(np.nextafter(np.float32(edge), np.float32(0)))
    assert decide(deltas, below, 4)[0].tolist() == [True] * 5


def test_not_a_number_computes() -> None:
    deltas = torch.ones(12, 1)
    deltas[5] = math.nan
    called = decide(deltas, 0.01, 4)[0].tolist()
    assert called == [True] * 4 + [False] * 2 + [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    "steps, cap, calls",
    [
        *[(50, 1, 25), (50, 2, 18), (50, 3, 15), (50, 4, 13), (50, 6, 10), (50, 8, 9), (50, 10, 8)],
        *[(25, 4, 8), (20, 4, 7), (10, 4, 5)],
    ],
)
def test_fewest_calls_possible(steps: int, cap: int, calls: int) -> None:
    assert decide(torch.ones(steps, 1), 0.01, cap).sum() == calls


@pytest.mark.parametrize("cap", [1, 2, 3, 4, 6, 8])
def test_first_run_is_five_long_and_later_ones_are_capped(cap: int) -> None:
    called = decide(torch.ones(60, 1), 0.01, cap)[0].tolist()
    assert called[:10] == [True] * 4 + [False] * 5 + [True]
    runs = "".join(".#"[call] for call in called[9:]).strip("#").split("#")
    assert {len(run) for run in runs[:-1]} == {cap}


def test_rows_do_not_see_each_other() -> None:
    deltas = random_walks("smooth", 50, 24)
    together = decide(deltas, 0.01, 4)
    for row in range(24):
        assert torch.equal(together[row], decide(deltas[:, row : row + 1], 0.01, 4)[0])


def test_reasons_and_values() -> None:
    criterion = Adaptive(mode="paper", threshold=0.01, max_skip=1).criterion()
    criterion.start(Course(rows=2))
    deltas = torch.ones(12, 2)
    deltas[:, 1] = 2.0 ** -torch.arange(12)  # xi / delta = 1/4 at every step
    decisions = [criterion.observe(sizes_only(k, d, [True] * 2)) for k, d in enumerate(deltas)]
    words = [[decision.reasons[row] for decision in decisions] for row in (0, 1)]
    assert words[0] == ["warm-up"] * 3 + ["skipped"] * 5 + ["cap", "skipped", "cap", "skipped"]
    assert words[1] == ["warm-up"] * 3 + ["criterion"] * 9
    assert all(decision.value is None for decision in decisions[:3])
    for decision in decisions[3:]:
        assert decision.value is not None and decision.value.dtype == torch.float32
        assert decision.value.tolist() == [0.0, 0.25]


def test_starting_again_forgets() -> None:
    criterion = Adaptive(mode="paper").criterion()
    for rows in (3, 1):
        criterion.start(Course(rows=rows))
        first = [
            criterion.observe(sizes_only(k, torch.ones(rows), [True] * rows)) for k in range(6)
        ]
        assert [d.compute for d in first] == [[True] * rows] * 3 + [[False] * rows] * 3


def test_settings() -> None:
    paper = Adaptive(mode="paper")
    assert paper == Adaptive(mode="paper", threshold=0.01, max_skip=4, reuse="hold", warm_up=4)
    assert (paper.protect_last, paper.debt) == (0, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Adaptive().threshold = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Adaptive("paper")  # type: ignore[misc]


@pytest.mark.parametrize("mode", CRITERIA)
def test_a_mode_fills_in_what_was_left_out(mode: str) -> None:
    own = CRITERIA[mode].DEFAULTS
    settings = Adaptive(mode=mode, max_skip=2)
    assert (settings.threshold, settings.max_skip, settings.reuse) == (own.threshold, 2, own.reuse)
    assert settings.criterion() is not settings.criterion()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"mode": "fast"}, "Adaptive: mode is 'fast', expected one of: '"),
        ({"threshold": -0.1}, "threshold is -0.1, expected 0 or more"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"max_skip": 0}, "max_skip is 0, expected a whole number"),
        ({"max_skip": 1.5}, "max_skip is 1.5"),
        ({"warm_up": 0}, "warm_up is 0, expected a whole number >= 1"),
        ({"protect_last": -1}, "protect_last is -1, expected a whole number >= 0"),
        ({"mode": "windowed", "reuse": "cubic"}, "reuse is 'cubic', expected one of: 'hold'"),
        (
            {"mode": "features", "predictor": "mine.safetensors"},
            "predictor is 'mine.safetensors', expected None in mode 'features'; only mode",
        ),
        ({"mode": "error-control", "predictor": "x"}, "expected None in mode 'error-control'"),
        ({"predictor": "x.safetensors"}, "cannot read the predictor x.safetensors"),
        ({"reuse": "linear"}, "trained for reuse='damped', got 'linear'"),
        ({"mode": "paper", "reuse": "linear"}, "mode 'paper' is the published program, with reuse"),
        ({"mode": "paper", "debt": True}, "debt=False only, got True"),
        ({"mode": "paper", "gradual": True}, "gradual=False only, got True"),
    ],
)
def test_bad_settings_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Adaptive(**settings)


@pytest.mark.parametrize(
    "mode, level",
    [
        ("third-difference", 1.0), ("elementwise", 1.0), ("windowed", 1.0), ("entropy", 1.0),
        ("features", 1.0), ("error-control", 1.0), ("learned", 0.0),
    ],
)  # fmt: skip
def test_a_threshold_of_zero_never_skips(mode: str, level: float) -> None:
    """Not even where the number is 0, as on a latent that moves along a line."""
    output = torch.full((2, 8), level)
    lines = torch.arange(13.0).view(13, 1, 1) + torch.linspace(0, 7, 8).expand(2, 8)
    for threshold, expected in ((0.0, {"warm-up", "criterion", "last"}), (1e-30, {"skipped"})):
        criterion = Adaptive(mode=mode, threshold=threshold, gradual=False).criterion()
        criterion.start(Course(rows=2, steps=12))
        computed, reasons, least = [True] * 2, [], math.inf
        for k in range(11):
            decision = criterion.observe(
                Observation(
                    step=k, x=lines[k], x_next=lines[k + 1], output=output, computed=computed
                )
            )
            computed = decision.compute
            reasons += decision.reasons
            if decision.value is not None:
                least = min(least, float(decision.value.min()))
        assert least == 0
        assert expected == set(reasons) if threshold == 0 else expected < set(reasons)
