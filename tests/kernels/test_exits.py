"""The exit operators' values: every backend against the plain-torch reference.

The same tests run under Triton's interpreter and on a GPU: see test_exits_elsewhere.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from exit_cases import MoveCase, Score, ScoreCase, move_cases, score_cases
from parareal_cases import INF, NAN, surroundings_are_untouched
from solver_step_cases import bits
from tolerances import LARGE_MEAN_ATOL, SCORE_ATOL
from torch import Tensor

from sidestep import kernels
from sidestep.kernels import reference

MODES = list(itertools.product((True, False), repeat=2))  # normalize, sigmoid


@pytest.mark.parametrize("case", score_cases(), ids=str)
def test_score_equals_reference(backend: str, device: str, case: ScoreCase) -> None:
    arguments = case.arguments()
    got = arguments.to(device)
    for normalize, sigmoid in MODES:
        score = kernels.exit_score(*got, normalize, sigmoid)
        expected = reference.exit_score(*arguments, normalize, sigmoid)
        assert score.shape == (case.B, case.k) and score.dtype is torch.float32
        torch.testing.assert_close(score.cpu(), expected, rtol=0, atol=SCORE_ATOL)
    for tensor, before in zip(got, arguments, strict=True):
        assert torch.equal(bits(tensor), bits(before)) and surroundings_are_untouched(tensor)


def test_score_is_the_layer_norm_and_the_sigmoid_of_torch(backend: str, device: str) -> None:
    a = ScoreCase(B=2, N=67, D=129, k=3).arguments()
    normalised = torch.nn.functional.layer_norm(a.hidden, (129,), eps=1e-2)
    logits = torch.einsum("bnd,kd->bnk", normalised, a.probe) + a.bias[:, None]
    got = kernels.exit_score(*a.to(device), eps=1e-2)
    torch.testing.assert_close(got.cpu(), logits.sigmoid().mean(1), rtol=0, atol=SCORE_ATOL)


def test_worked_example(backend: str, device: str) -> None:
    """LN([1, 3]) = [-1, 1] / sqrt(1 + 3); LN([5, 5]) = 0."""
    a = Score(
        torch.tensor([[[1.0, 3.0], [5.0, 5.0]]], device=device),
        torch.tensor([[1.0, 2.0], [0.0, 0.0]], device=device),
        torch.tensor([[0.25, 0.0]], device=device),
    )
    assert kernels.exit_score(*a, sigmoid=False, eps=3.0).tolist() == [[0.5, 0.0]]
    assert kernels.exit_score(*a, normalize=False, sigmoid=False).tolist() == [[11.25, 0.0]]
    assert kernels.exit_score(*a, normalize=False)[0, 1].item() == 0.5


def test_a_large_mean_costs_no_digits(backend: str, device: str) -> None:
    arguments = ScoreCase(B=2, N=5, D=1300, k=3).arguments(mean=100.0)
    got = kernels.exit_score(*arguments.to(device), sigmoid=False).cpu()
    expected = reference.exit_score(*arguments, sigmoid=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=LARGE_MEAN_ATOL)


def test_far_logits_are_certain(backend: str, device: str) -> None:
    a = ScoreCase(B=2, N=5, D=16, k=1).arguments().to(device)
    a.bias.copy_(torch.tensor([[1000.0], [-1000.0]]))
    assert kernels.exit_score(*a).tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_other_rows(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    together = ScoreCase(B=3, N=67, D=256, k=2, dtype=dtype).arguments().to(device)
    score = kernels.exit_score(*together)
    for i in range(3):
        assert torch.equal(bits(kernels.exit_score(*together.row(i))[0]), bits(score[i]))
    turned = Score(together.hidden.flip(0), together.probe, together.bias.flip(0))
    assert torch.equal(bits(kernels.exit_score(*turned).flip(0)), bits(score))
    together.hidden[1, 3, 5] = NAN
    again = kernels.exit_score(*together)
    assert torch.equal(bits(again[::2]), bits(score[::2])) and again[1].isnan().all()


@pytest.mark.parametrize("D", [33, 256])
def test_bits_do_not_depend_on_strides_and_alignment(backend: str, device: str, D: int) -> None:
    a = ScoreCase(B=2, N=67, D=D, k=2, dtype=torch.float16).arguments()
    score = kernels.exit_score(*a.to(device))
    assert score.isfinite().all()
    for other in (a.to(device, offset=1), a.to(device).amid_other_tokens()):
        assert torch.equal(bits(kernels.exit_score(*other)), bits(score))
    one = a.hidden[:1].expand(2, -1, -1)  # rows that are one
    got = kernels.exit_score(
        one.to(device), a.probe.to(device), a.bias[:1].expand(2, 2).contiguous().to(device)
    )
    assert torch.equal(bits(got[0]), bits(score[0])) and torch.equal(bits(got[1]), bits(score[0]))


def test_a_second_call_gives_the_same(backend: str, device: str) -> None:
    """Scratch memory is left as it was found, whatever the sizes of the calls between."""
    a = ScoreCase(B=2, N=67, D=129, k=3).arguments().to(device)
    score, rows = kernels.exit_score(*a), torch.linspace(0, 1, 9, device=device)
    order, _ = kernels.exit_decide(rows, rows.flip(0))
    kernels.exit_score(*ScoreCase(B=3, N=150, D=33, k=1).arguments().to(device))
    kernels.exit_decide(rows[:4].contiguous(), torch.zeros(4, device=device))
    assert torch.equal(bits(kernels.exit_score(*a)), bits(score))
    assert torch.equal(kernels.exit_decide(rows, rows.flip(0))[0], order)


def decide(device: str, score: list[float], limit: list[float], group: list[int] | None) -> Tensor:
    """order and kept, as one list of numbers on the host."""
    order, kept = kernels.exit_decide(
        torch.tensor(score, device=device),
        torch.tensor(limit, device=device),
        None if group is None else torch.tensor(group, dtype=torch.int64, device=device),
    )
    assert order.dtype is kept.dtype is torch.int64
    return torch.cat([order, kept]).cpu()


@pytest.mark.parametrize(
    ("score", "group", "order", "kept"),
    [
        ([0, 1, 1, 0, 1, 0], None, [0, 3, 5, 1, 2, 4], 3),
        ([0, 0, 0], None, [0, 1, 2], 3),
        ([1, 1, 1], None, [0, 1, 2], 0),
        ([1, 0], None, [1, 0], 1),
        ([0, 1], None, [0, 1], 1),
        ([NAN, 1, INF], None, [0, 2, 1], 2),
        # Guidance pairs (0, 3), (1, 4), (2, 5): one half that is not certain keeps the other.
        ([1, 1, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2], [4, 1, 2, 5, 0, 3], 4),
        ([1, 1, 1, 0], [3, 3, 1, 1], [2, 3, 0, 1], 2),
        ([1, 1, 1], [2, 2, 2], [0, 1, 2], 0),
    ],
)
def test_decisions(
    backend: str,
    device: str,
    score: list[float],
    group: list[int] | None,
    order: list[int],
    kept: int,
) -> None:
    """Here 1 is below its limit of 1, and 0 above its limit of -1."""
    limit = [1.0 if s == 1 else -1.0 for s in score]
    assert decide(device, [float(s) for s in score], limit, group).tolist() == [*order, kept]


@pytest.mark.parametrize("n", [0, 1, 2, 37, 1024, 2500])
@pytest.mark.parametrize("grouped", [False, True])
def test_decisions_equal_reference(backend: str, device: str, n: int, grouped: bool) -> None:
    make = torch.Generator().manual_seed(n)
    score, limit = torch.rand(n, generator=make), torch.rand(n, generator=make) + 0.2
    group = torch.randint(0, n, (n,), generator=make) if grouped and n else None
    order, kept = kernels.exit_decide(
        score.to(device), limit.to(device), None if group is None else group.to(device)
    )
    expected = reference.exit_decide(score, limit, group)
    assert torch.equal(order.cpu(), expected[0]) and torch.equal(kept.cpu(), expected[1])
    assert sorted(order.tolist()) == list(range(n))


@pytest.mark.parametrize("case", move_cases(), ids=str)
def test_moves_equal_reference(backend: str, device: str, case: MoveCase) -> None:
    expected = case.arguments()
    if case.n > 0:
        expected.hidden.view(-1)[:1] = NAN  # NaN moves like any other
    before = expected.copy()
    got = expected.copy(device)
    reference.exit_compact_(*expected)
    assert kernels.exit_compact_(*got) is None
    kept = int(expected.kept)
    assert torch.equal(bits(got.hidden[:kept]), bits(before.hidden[before.order[:kept]]))
    assert torch.equal(bits(got.hidden[:kept]), bits(expected.hidden[:kept]))
    assert torch.equal(bits(got.out), bits(expected.out))
    others = [p for p in range(case.n + 2) if p not in before.place[before.order[kept:]]]
    assert torch.equal(bits(got.out[others]), bits(before.out[others]))
    for tensor, was in zip(got[2:], before[2:], strict=True):
        assert torch.equal(tensor.cpu(), was)
    assert surroundings_are_untouched(got.hidden) and surroundings_are_untouched(got.out)


def test_moves_of_a_decision(backend: str, device: str) -> None:
    """All rows, through three exits, arrive at their places with what they had there."""
    make = torch.Generator().manual_seed(0)
    B, scores = 9, torch.rand(3, 9, generator=make)
    group = torch.arange(B) % 5
    limits = torch.tensor([0.5, 0.8, INF]).expand(B, 3).contiguous().to(device)
    hidden = torch.arange(float(B), device=device)[:, None].repeat(1, 5)
    out = hidden.new_full((B, 5), NAN)
    place = torch.arange(B, device=device)
    left = torch.full((B,), -1)
    for i in range(3):
        score = scores[i].to(device)[place]
        _, joint = torch.unique(group.to(device)[place], return_inverse=True)
        order, kept = kernels.exit_decide(score, limits[: len(place), i].contiguous(), joint)
        kernels.exit_compact_(hidden, out, order, kept, place)
        n = int(kept)
        left[place[order[n:]].cpu()] = i
        hidden, place = hidden[:n] + 10, place[order[:n]].contiguous()
    assert len(place) == 0
    for g in range(5):
        rows = (group == g).nonzero()[:, 0]
        depth = next(i for i in range(3) if (scores[i][rows] <= (0.5, 0.8, INF)[i]).all())
        assert (left[rows] == depth).all()
    assert torch.equal(out.cpu(), (torch.arange(9.0) + 10 * left)[:, None].repeat(1, 5))
