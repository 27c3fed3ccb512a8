"""The exit operators as torch operators: opcheck, torch.compile, fakes, profiler, backends."""

from __future__ import annotations

import pytest
import torch
from exit_cases import MoveCase, Moves, Score, ScoreCase
from solver_step_cases import bits
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sidestep import kernels

SCORE = torch.ops.sidestep.exit_score.default
DECIDE = torch.ops.sidestep.exit_decide.default
COMPACT = torch.ops.sidestep.exit_compact_.default
CASE = ScoreCase(B=6, N=5, D=129, k=3)
MOVES = MoveCase((1, 2, 4), 6)


def test_opcheck(backend: str, device: str) -> None:
    score = CASE.arguments().to(device)
    group = torch.tensor([0, 1, 2, 0, 1, 2], device=device)
    rows = score.bias[:, 0].contiguous()
    for operator, given in (
        (SCORE, (*score, False)),
        (DECIDE, (rows, rows.flip(0), group)),
        (COMPACT, tuple(MOVES.arguments().copy(device))),
    ):
        assert set(torch.library.opcheck(operator, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend: str, device: str, dynamic: bool) -> None:
    def leave(a: Score, out: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score = kernels.exit_score(*a)[:, 0].contiguous()
        order, kept = kernels.exit_decide(score, score.flip(0))
        kernels.exit_compact_(a.hidden, out, order, kept, place)
        return order, kept + 1, out * 2

    place = torch.arange(6, device=device)
    results = []
    torch.compiler.reset()
    for run in (
        torch.compile(leave, fullgraph=True, backend="aot_eager", dynamic=dynamic),
        leave,
    ):
        a = CASE.arguments().to(device)
        results.append((*run(a, torch.zeros_like(a.hidden), place), a.hidden[:3]))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got.cpu(), expected.cpu())


def test_operators_and_functions_are_the_same(backend: str, device: str) -> None:
    a = CASE.arguments().to(device)
    assert torch.equal(bits(kernels.exit_score(*a)), bits(SCORE(*a)))
    named = kernels.exit_score(**a._asdict(), normalize=False, sigmoid=False, eps=1.0)
    assert torch.equal(bits(named), bits(SCORE(*a, False, False, 1.0)))
    rows = a.bias[:, 0].contiguous()
    decided = kernels.exit_decide(score=rows, limit=rows.flip(0))
    for got, expected in zip(decided, DECIDE(rows, rows.flip(0)), strict=True):
        assert torch.equal(got, expected)
    by_function, by_operator = MOVES.arguments().copy(device), MOVES.arguments().copy(device)
    kernels.exit_compact_(**by_function._asdict())
    COMPACT(*by_operator)
    assert torch.equal(bits(by_function.out), bits(by_operator.out))


def test_meta_tensors_are_checked_and_nothing_runs() -> None:
    a = Score(*(tensor.to("meta") for tensor in CASE.arguments()))
    assert kernels.exit_score(*a).shape == (6, 3)
    order, kept = kernels.exit_decide(a.bias[:, 0].contiguous(), a.bias[:, 1].contiguous())
    assert (order.shape, kept.shape, order.dtype, kept.dtype) == (
        (6,),
        (1,),
        torch.int64,
        torch.int64,
    )
    moves = Moves(*(tensor.to("meta") for tensor in MOVES.arguments()))
    kernels.exit_compact_(*moves)
    with pytest.raises(ValueError, match=r"place has shape \[2\], expected \[6\]"):
        kernels.exit_compact_(*moves._replace(place=moves.place[:2]))


def test_a_profiler_sees_the_operators() -> None:
    a = CASE.arguments()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        kernels.exit_score(*a)
        kernels.exit_decide(a.bias[:, 0].contiguous(), a.bias[:, 1].contiguous())
        kernels.exit_compact_(*MOVES.arguments())
    counts = {event.key: event.count for event in seen.key_averages()}
    for name in ("exit_score", "exit_decide", "exit_compact_"):
        assert counts[f"sidestep::{name}"] == 1


def test_triton_backend_on_cpu_tensors_says_what_is_missing() -> None:
    a = CASE.arguments()
    rows = a.bias[:, 0].contiguous()
    for operator, name, given in (
        (kernels.exit_score, "hidden", a),
        (kernels.exit_decide, "score", (rows, rows)),
        (kernels.exit_compact_, "hidden", MOVES.arguments()),
    ):
        with kernels.use_backend("triton"), pytest.raises(kernels.BackendUnavailable) as caught:
            operator(*given)
        assert str(caught.value) == (
            f"{operator.__name__}: the Triton backend needs a CUDA tensor, {name} is on cpu; "
            "TRITON_INTERPRET=1 runs it on the CPU"
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_native_backend_on_a_gpu_says_what_to_use() -> None:
    a = CASE.arguments().to("cuda")
    with kernels.use_backend("native"), pytest.raises(kernels.BackendUnavailable) as caught:
        kernels.exit_score(*a)
    assert str(caught.value) == (
        "exit_score: the native library has no CUDA kernel for it; use SIDESTEP_KERNELS=triton"
    )
