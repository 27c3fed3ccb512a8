"""`PreparedStep` against the operator it stands for: values, refusals, allocations, compilers."""

from __future__ import annotations

import pytest
import torch
from solver_step_cases import Arguments, Case, bits, value_cases
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sidestep import kernels
from sidestep.kernels import PreparedStep


def _prepare(a: Arguments) -> PreparedStep:
    return PreparedStep(a.registers, a.weights, a.table, a.step, a.slot, a.stats)


def _stacked(a: Arguments) -> Tensor:  # [G * rows, D], as a pipeline's model returns it
    return torch.cat(a.outputs)


@pytest.mark.parametrize("case", value_cases(), ids=str)
def test_is_the_operator(backend: str, device: str, case: Case) -> None:
    expected = case.arguments().copy(device)
    got = expected.copy()
    kernels.solver_step(*expected)
    _prepare(got)(_stacked(got), got.noise, got.model_input)
    for name in ("registers", "model_input", "stats"):
        if expected.tensors().get(name) is not None:
            assert torch.equal(bits(got.tensors()[name]), bits(expected.tensors()[name])), name


def test_shapes_of_a_model_are_taken_as_they_are(backend: str, device: str) -> None:
    a = Case(D=4 * 5 * 6, rows=2, R=2, G=2).arguments().copy(device)
    expected = a.copy()
    kernels.solver_step(*expected)
    assert a.noise is not None and a.model_input is not None
    model_input = torch.empty(4, 4, 5, 6, device=device)
    _prepare(a)(_stacked(a).view(4, 4, 5, 6), a.noise.view(2, 4, 5, 6), model_input)
    assert torch.equal(bits(a.registers), bits(expected.registers))
    assert torch.equal(bits(model_input.view(2, 2, -1)), bits(expected.model_input))


def test_the_step_index_is_read_at_every_call(backend: str, device: str) -> None:
    a = Case(D=33, rows=1, R=2, G=1, noise=False, permuted=False).arguments().copy(device)
    a.registers.nan_to_num_()
    expected = a.copy()
    prepared = _prepare(a)
    for k in (0, 2, 5):
        a.step.fill_(k)
        expected.step.fill_(k)
        prepared(_stacked(a))
        kernels.solver_step(*expected._replace(model_input=None))
        assert torch.equal(bits(a.registers), bits(expected.registers))


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (lambda o, n, m: (o[1:], n, m), ValueError, r"output has shape \[3, 8\], expected 32"),
        (lambda o, n, m: (o.T.contiguous().T, n, m), ValueError, r"output has strides \[1, 4\]"),
        (lambda o, n, m: (o.double(), n, m), TypeError, "dtype torch.float64, expected float32"),
        (lambda o, n, m: (o, n[:1], m), ValueError, r"noise has shape \[1, 8\], expected 16"),
        (lambda o, n, m: (o, n.half(), m), TypeError, "noise has dtype torch.float16"),
        (lambda o, n, m: (o, n, m.bfloat16()), TypeError, "model_input has dtype torch.bfloat16"),
        (lambda o, n, m: (o, n, o), ValueError, "overlaps"),
    ],
)
def test_a_bad_call_is_refused_and_touches_nothing(
    backend: str, device: str, spoil: object, error: type[Exception], sentence: str
) -> None:
    a = Case(D=8, rows=2, R=2, G=2, permuted=False).arguments().copy(device)
    before = a.copy()
    output = _stacked(a)
    with pytest.raises(error, match=sentence):
        _prepare(a)(*spoil(output, a.noise, a.model_input))  # type: ignore[operator]
    for name, tensor in a.tensors().items():
        assert torch.equal(bits(tensor.float()), bits(before.tensors()[name].float())), name


def test_what_is_bound_is_checked_at_once(backend: str, device: str) -> None:
    a = Case(D=8, rows=2, R=2, G=2, permuted=False).arguments().copy(device)
    with pytest.raises(ValueError, match=r"stats has shape \[1, 2\]"):
        _prepare(a._replace(stats=a.stats[:1]))
    with pytest.raises(TypeError, match=r"step has dtype torch\.int32"):
        _prepare(a._replace(step=a.step.int()))
    with pytest.raises(ValueError, match=r"weights has shape \[4\], expected \[rows, G\]"):
        _prepare(a._replace(weights=a.weights.reshape(-1)))


def test_a_profiler_sees_the_operator_and_no_allocation() -> None:
    a = Case(D=4096, rows=2, R=2, G=2).arguments()
    prepared, output = _prepare(a), _stacked(a)
    prepared(output, a.noise, a.model_input)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        prepared(output, a.noise, a.model_input)
    events = {event.key: event for event in recorded.key_averages()}
    assert events["sidestep::solver_step"].count == 1
    assert sum(event.self_cpu_memory_usage for event in recorded.key_averages()) == 0


def test_compiles_without_graph_breaks() -> None:
    a = Case(D=64, rows=2, R=2, G=2, permuted=False).arguments()
    a.registers.nan_to_num_()
    expected = a.copy()
    prepared, output = _prepare(a), _stacked(a).nan_to_num()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(output: Tensor) -> Tensor:
        prepared(output, a.noise)
        return prepared.registers * 1

    result = step(output)
    kernels.solver_step(*expected._replace(outputs=list(output.chunk(2)), model_input=None))
    assert torch.equal(bits(result), bits(expected.registers))
