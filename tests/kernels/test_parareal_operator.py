"""The parareal operators as torch operators: opcheck, torch.compile, fakes, profiler, backends."""

from __future__ import annotations

import pytest
import torch
from parareal_cases import Arguments, Case
from solver_step_cases import bits
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sidestep import kernels

GRAM = torch.ops.sidestep.difference_gram.default
CORRECT = torch.ops.sidestep.parareal_correct_.default
CASE = Case(D=129, n=3, R=2)


def test_opcheck(backend: str, device: str) -> None:
    arguments = CASE.finite(device)
    for operator, given in ((GRAM, arguments[2:4]), (CORRECT, tuple(arguments))):
        assert set(torch.library.opcheck(operator, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend: str, device: str, dynamic: bool) -> None:
    def iterate(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
        gram = kernels.difference_gram(arguments.new, arguments.old)
        residual = kernels.parareal_correct_(*arguments)
        return gram.sum(1), residual.sqrt(), arguments.boundary * 2

    expected, got = CASE.finite(device), CASE.finite(device)
    torch.compiler.reset()
    compiled = torch.compile(iterate, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(compiled(got), iterate(expected), strict=True):
        assert torch.equal(bits(a), bits(b))
    assert torch.equal(bits(got.boundary), bits(expected.boundary))


def test_operators_and_functions_are_the_same(backend: str, device: str) -> None:
    by_function, by_operator = CASE.finite(device), CASE.finite(device)
    assert torch.equal(kernels.difference_gram(*by_function[2:4]), GRAM(*by_operator[2:4]))
    named = kernels.parareal_correct_(**by_function._asdict())
    assert torch.equal(bits(named), bits(CORRECT(*by_operator)))
    assert torch.equal(bits(by_function.boundary), bits(by_operator.boundary))


def test_meta_tensors_are_checked_and_nothing_runs() -> None:
    arguments = Arguments(*(tensor.to("meta") for tensor in CASE.arguments()))
    assert kernels.difference_gram(*arguments[2:4]).shape == (3, 3, 3)
    assert kernels.parareal_correct_(*arguments).shape == (3, 2)
    with pytest.raises(ValueError, match=r"fine has shape \[2, 2, 129\], expected \[3, 2, 129\]"):
        kernels.parareal_correct_(*arguments._replace(fine=arguments.fine[:2]))


def test_a_profiler_sees_the_operators() -> None:
    arguments = CASE.finite("cpu")
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        kernels.difference_gram(*arguments[2:4])
        kernels.parareal_correct_(*arguments)
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["sidestep::difference_gram"] == counts["sidestep::parareal_correct_"] == 1


def test_triton_backend_on_cpu_tensors_says_what_is_missing() -> None:
    arguments = CASE.finite("cpu")
    for operator, name, given in (
        (kernels.difference_gram, "new", arguments[2:4]),
        (kernels.parareal_correct_, "boundary", arguments),
    ):
        with kernels.use_backend("triton"), pytest.raises(kernels.BackendUnavailable) as caught:
            operator(*given)
        assert str(caught.value) == (
            f"{operator.__name__}: the Triton backend needs a CUDA tensor, {name} is on cpu; "
            "TRITON_INTERPRET=1 runs it on the CPU"
        )
