"""The fused step's values: every backend against the plain-torch reference, bit for bit.

The same tests run under Triton's interpreter and on a GPU: see test_solver_step_elsewhere.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from solver_step_cases import NAN, STEPS, Arguments, Case, bits, ulps, value_cases
from tolerances import FLOAT64_ATOL, FLOAT64_RTOL, INTERPRETER_MODEL_INPUT_ULPS, STATS_RTOL
from torch import Tensor

from sidestep import kernels
from sidestep.kernels import reference


def assert_same_result(backend: str, device: str, got: Arguments, expected: Arguments) -> None:
    assert torch.equal(bits(got.registers), bits(expected.registers))
    if expected.model_input is not None:
        interpreted = backend == "triton" and device == "cpu"
        allowed = INTERPRETER_MODEL_INPUT_ULPS[expected.model_input.dtype] if interpreted else 0
        assert ulps(got.model_input, expected.model_input) <= allowed
    torch.testing.assert_close(
        got.stats.cpu(), expected.stats, rtol=STATS_RTOL, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("case", value_cases(), ids=str)
def test_equals_reference(backend: str, device: str, case: Case) -> None:
    expected = case.arguments()
    got = expected.copy(device)
    untouched = [n for n in expected.tensors() if n not in ("registers", "model_input", "stats")]
    before = {name: expected.tensors()[name].clone() for name in untouched}
    reference.solver_step(*expected)
    kernels.solver_step(*got)
    assert_same_result(backend, device, got, expected)
    for name in untouched:
        torch.testing.assert_close(
            got.tensors()[name].cpu(), before[name], rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("R", [1, 2, 6])
def test_equals_matrix_product_in_float64(backend: str, device: str, R: int) -> None:
    arguments = Case(D=129, rows=1, R=R, G=3, permuted=False).arguments()
    matrix = arguments.table[0, :-1].view(R + 1, R + 2).double()
    u = (arguments.weights[0, :, None] * torch.stack(arguments.outputs)[:, 0]).double().sum(0)
    before = arguments.registers[0].double()
    expected = matrix @ torch.cat([before, u[None], arguments.noise.double()])  # [R+1, D]

    got = arguments.copy(device)
    kernels.solver_step(*got)

    def close(actual: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(
            actual.cpu().double(), wanted, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL
        )

    close(got.registers[0], expected[:R])
    close(got.model_input[:, 0], (expected[0] * arguments.table[0, -1].double()).expand(3, -1))
    close(got.stats[0, 0], (expected[0] - before[0]).abs().mean())
    close(got.stats[0, 1], expected[R].abs().mean())


def test_worked_example(backend: str, device: str) -> None:
    """x = [1, 2], m = [3, 4]; u = 2 * 10 - 1 * 4; x' = 0.5 x + 2 u + z, m' = u, E = m - z."""
    table = torch.tensor(
        [[0.5, 0.0, 2.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.25]], device=device
    )
    got = Arguments(
        registers=torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], device=device),
        outputs=[torch.full((1, 2), v, dtype=torch.float16, device=device) for v in (10.0, 4.0)],
        weights=torch.tensor([[2.0, -1.0]], device=device),
        noise=torch.tensor([[0.5, -1.0]], device=device),
        table=table,
        step=torch.zeros(1, dtype=torch.int64, device=device),
        slot=None,
        model_input=torch.empty(2, 1, 2, dtype=torch.float16, device=device),
        stats=torch.empty(1, 2, device=device),
    )
    kernels.solver_step(*got)
    assert got.registers.tolist() == [[[33.0, 32.0], [16.0, 16.0]]]
    assert got.model_input.tolist() == [[[8.25, 8.0]], [[8.25, 8.0]]]
    assert got.stats.tolist() == [[31.0, 3.75]]


def test_nan_in_x_without_coefficient_reaches_only_the_step_size(backend: str, device: str) -> None:
    case = Case(D=129, rows=1, R=2, G=1, permuted=False)
    arguments = case.arguments()
    arguments.table[0, :-1].view(3, 4)[:, 0] = 0.0
    arguments.registers[0, 0, 7] = NAN
    got = arguments.copy(device)
    kernels.solver_step(*got)
    assert got.registers[0].isfinite().all()
    assert got.model_input.isfinite().all()
    assert math.isnan(got.stats[0, 0]) and math.isfinite(got.stats[0, 1])


def test_one_zero_coefficient_keeps_nan_out_of_its_row_only(backend: str, device: str) -> None:
    arguments = Case(D=16, rows=1, R=2, G=1, permuted=False).arguments()
    arguments.table[0, 1] = 0.0  # x' does not use register 1; register 1' does
    arguments.registers[0, 1] = NAN
    got = arguments.copy(device)
    kernels.solver_step(*got)
    assert got.registers[0, 0].isfinite().all()
    assert got.registers[0, 1].isnan().all()


def test_noise_coefficients_count_as_zero_without_noise(backend: str, device: str) -> None:
    arguments = Case(D=129, rows=1, R=2, G=1, noise=False, permuted=False).arguments()
    plain = arguments.copy(device)
    plain.table[:, :-1].view(STEPS, 3, 4)[:, :, 3] = 0.0
    got = arguments.copy(device)
    assert (got.table[0, 3::4] != 0).any()
    kernels.solver_step(*got)
    kernels.solver_step(*plain)
    assert torch.equal(bits(got.registers), bits(plain.registers))
    assert torch.equal(bits(got.stats), bits(plain.stats))


def test_signed_zero_survives(backend: str, device: str) -> None:
    """A sum that started from +0 would turn -0 into +0."""
    arguments = Case(D=16, rows=1, R=1, G=1, noise=False, permuted=False).arguments()
    arguments.table[0] = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    arguments.table[0, 0] = 2.0
    arguments.registers[0] = -0.0
    got = arguments.copy(device)
    kernels.solver_step(*got)
    assert torch.signbit(got.registers[0]).all()
    assert torch.signbit(got.model_input).all()
    assert got.stats.tolist() == [[0.0, 0.0]]


def test_bits_do_not_depend_on_the_other_rows(backend: str, device: str) -> None:
    arguments = Case(D=4231, rows=2, R=2, G=2, dtype=torch.float16).arguments()
    together = arguments.copy(device)
    kernels.solver_step(*together)
    for row in range(2):
        alone = arguments.copy(device)
        alone = alone._replace(
            outputs=[output[row : row + 1] for output in alone.outputs],
            weights=alone.weights[row : row + 1],
            noise=alone.noise[row : row + 1],
            step=alone.step[row : row + 1],
            slot=alone.slot[row : row + 1],
            model_input=torch.empty(2, 1, 4231, dtype=torch.float16, device=device),
            stats=torch.empty(1, 2, device=device),
        )
        kernels.solver_step(*alone)
        owned = int(alone.slot)
        assert torch.equal(bits(alone.registers[owned]), bits(together.registers[owned]))
        assert torch.equal(bits(alone.model_input[:, 0]), bits(together.model_input[:, row]))
        assert torch.equal(bits(alone.stats[0]), bits(together.stats[row]))


def test_a_trajectory_of_steps_equals_the_reference(backend: str, device: str) -> None:
    """In place, again and again, each row at a step of its own."""
    expected = Case(D=1300, rows=3, R=3, G=2, dtype=torch.float16).arguments()
    expected.registers.nan_to_num_(0.5)
    for tensor in (*expected.outputs, expected.noise):
        tensor.nan_to_num_(0.25)
    got = expected.copy(device)
    for _ in range(4):
        reference.solver_step(*expected)
        kernels.solver_step(*got)
        assert_same_result(backend, device, got, expected)
        expected.step.add_(1).remainder_(STEPS)
        got.step.add_(1).remainder_(STEPS)
