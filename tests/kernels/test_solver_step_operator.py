"""The fused step as a torch operator: opcheck, torch.compile, fakes, allocations, lazy imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from solver_step_cases import Arguments, Case, bits
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sidestep import kernels
from sidestep.kernels import reference

OPERATOR = torch.ops.sidestep.solver_step.default
CASES = [
    Case(D=64, rows=2, R=2, G=2),
    Case(D=129, rows=3, R=3, G=1, dtype=torch.float16, noise=False),
    Case(D=64, rows=2, R=1, G=3, dtype=torch.bfloat16, permuted=False, model_input=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(backend: str, device: str, case: Case) -> None:
    arguments = case.arguments().copy(device)
    arguments.registers.nan_to_num_(0.5)
    arguments.stats.zero_()
    for tensor in (*arguments.outputs, arguments.model_input, arguments.noise):
        if tensor is not None:
            tensor.nan_to_num_(0.25)
    assert set(torch.library.opcheck(OPERATOR, tuple(arguments)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(
    backend: str, device: str, case: Case, dynamic: bool
) -> None:
    def loop(arguments: Arguments, gain: Tensor) -> Tensor:
        kernels.solver_step(*arguments)
        return arguments.registers[:, 0] * gain

    expected, got = case.arguments().copy(device), case.arguments().copy(device)
    gain = torch.tensor(2.0, device=device)
    torch.compiler.reset()
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert torch.equal(bits(compiled(got, gain)), bits(loop(expected, gain)))
    for name, tensor in expected.tensors().items():
        if tensor.is_floating_point():
            assert torch.equal(bits(got.tensors()[name]), bits(tensor)), name


def test_operator_and_function_are_the_same(backend: str, device: str) -> None:
    by_function, by_operator = CASES[0].arguments().copy(device), CASES[0].arguments().copy(device)
    kernels.solver_step(*by_function)
    OPERATOR(*by_operator)
    assert torch.equal(bits(by_function.registers), bits(by_operator.registers))
    assert torch.equal(bits(by_function.stats), bits(by_operator.stats))


def test_keywords_work(backend: str, device: str) -> None:
    positional, named = CASES[0].arguments().copy(device), CASES[0].arguments().copy(device)
    kernels.solver_step(*positional)
    kernels.solver_step(**named._asdict())
    assert torch.equal(bits(positional.registers), bits(named.registers))


def test_meta_tensors_are_checked_and_nothing_runs() -> None:
    arguments = CASES[0].arguments().copy("meta")
    kernels.solver_step(*arguments)
    wrong = arguments._replace(stats=arguments.stats[:, :1])
    with pytest.raises(ValueError, match=r"stats has shape \[2, 1\], expected \[2, 2\]"):
        kernels.solver_step(*wrong)


def test_a_profiler_sees_the_operator_and_no_allocation() -> None:
    """Native backend; rows and noise present, D large enough for several chunks and threads."""
    arguments = Case(D=100_000, rows=2, R=3, G=2, dtype=torch.float16).arguments()
    kernels.solver_step(*arguments)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for _ in range(5):
            kernels.solver_step(*arguments)
    events = {event.key: event for event in seen.key_averages()}
    assert events["sidestep::solver_step"].count == 5
    assert sum(abs(event.cpu_memory_usage) for event in events.values()) == 0
    assert "[memory]" not in events


def test_a_profiler_would_see_an_allocation() -> None:
    """The previous test can fail: the reference allocates."""
    arguments = Case(D=1000, rows=2, R=3, G=2).arguments()
    with (
        kernels.use_backend("reference"),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        kernels.solver_step(*arguments)
    assert sum(abs(event.cpu_memory_usage) for event in seen.key_averages()) > 0


def test_native_call_keeps_no_python_objects() -> None:
    arguments = Case(D=129, rows=2, R=2, G=2).arguments()
    for _ in range(20):
        kernels.solver_step(*arguments)
    before = sys.getallocatedblocks()
    for _ in range(200):
        kernels.solver_step(*arguments)
    assert sys.getallocatedblocks() - before < 20


def test_threads_and_instruction_sets_give_the_same_bits() -> None:
    from sidestep import _native

    arguments = Case(D=100_003, rows=3, R=3, G=2, dtype=torch.bfloat16).arguments()
    expected = arguments.copy()
    reference.solver_step(*expected)
    threads, simd = _native.num_threads(), _native.simd()
    results = []
    try:
        for n in (1, 2, 3):
            for name in ("scalar", simd):
                _native.set_num_threads(n)
                _native.set_simd(name)
                got = arguments.copy()
                kernels.solver_step(*got)
                results.append(got)
    finally:
        _native.set_num_threads(threads)
        _native.set_simd(simd)
    for got in results:
        assert torch.equal(bits(got.registers), bits(expected.registers))
        assert torch.equal(bits(got.model_input), bits(expected.model_input))
        assert torch.equal(bits(got.stats), bits(results[0].stats))


def test_triton_backend_on_cpu_tensors_says_what_is_missing() -> None:
    with kernels.use_backend("triton"), pytest.raises(kernels.BackendUnavailable) as caught:
        kernels.solver_step(*CASES[0].arguments())
    assert str(caught.value) == (
        "solver_step: the Triton backend needs a CUDA tensor, registers is on cpu; "
        "TRITON_INTERPRET=1 runs it on the CPU"
    )


def test_table_width() -> None:
    assert [kernels.table_width(R) for R in range(1, 7)] == [7, 13, 21, 31, 43, 57]


def test_importing_loads_no_backend_and_touches_no_gpu() -> None:
    program = (
        "import sys, importlib.util, torch, sidestep.kernels\n"
        "loaded = {'triton', 'sidestep._native', 'sidestep.kernels.native'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert importlib.util.find_spec('triton_kernels') is None\n"
        "assert importlib.util.find_spec('runtime') is None\n"
    )
    run = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
