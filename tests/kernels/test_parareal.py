"""The parareal operators' values: every backend against the plain-torch reference.

The same tests run under Triton's interpreter and on a GPU: see test_parareal_elsewhere.py.
"""

from __future__ import annotations

import pytest
import torch
from parareal_cases import INF, NAN, Arguments, Case, surroundings_are_untouched, value_cases
from solver_step_cases import bits
from tolerances import FLOAT64_ATOL, FLOAT64_RTOL, GRAM_RTOL, STATS_RTOL
from torch import Tensor

from sidestep import kernels
from sidestep.kernels import reference

CASES = value_cases()


def assert_same_gram(got: Tensor, expected: Tensor) -> None:
    """Within the tolerance relative to the lengths of the two vectors."""
    lengths = expected.diagonal(dim1=1, dim2=2).double().sqrt()
    allowed = GRAM_RTOL * lengths[:, :, None] * lengths[:, None, :]
    difference = got.cpu().double() - expected.double()
    assert got.shape == expected.shape and got.dtype is torch.float32
    assert (difference.abs() <= allowed).all(), difference.abs().max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gram_equals_reference(backend: str, device: str, case: Case) -> None:
    arguments = case.arguments()
    got = arguments.copy(device)
    gram = kernels.difference_gram(got.new, got.old)
    assert_same_gram(gram, reference.difference_gram(arguments.new, arguments.old))
    assert torch.equal(gram, gram.mT)
    for name in ("new", "old"):
        assert torch.equal(bits(getattr(got, name)), bits(getattr(arguments, name)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_correction_equals_reference(backend: str, device: str, case: Case) -> None:
    expected = case.poisoned()
    got = expected.copy(device)
    before = expected.copy()
    wanted = reference.parareal_correct_(*expected)
    residual = kernels.parareal_correct_(*got)
    assert torch.equal(bits(got.boundary), bits(expected.boundary))
    assert expected.boundary.isfinite().all()  # no NaN has spread
    torch.testing.assert_close(residual.cpu(), wanted, rtol=STATS_RTOL, atol=0)
    for name in ("fine", "new", "old", "coefficients"):
        assert torch.equal(bits(getattr(got, name)), bits(getattr(before, name))), name
    assert all(surroundings_are_untouched(tensor) for tensor in got)


@pytest.mark.parametrize("R", [1, 2, 6])
def test_equal_the_formulas_in_float64(backend: str, device: str, R: int) -> None:
    a = Case(D=1300, n=2, R=R).finite("cpu")
    d = a.new.double() - a.old.double()
    expected = a.fine.double() + a.coefficients.double() @ d
    got = a.copy(device)
    assert_same_gram(kernels.difference_gram(got.new, got.old), (d @ d.mT).float())
    residual = kernels.parareal_correct_(*got)
    change, size = expected[:, 0] - a.boundary[:, 0], expected[:, 0]
    for actual, wanted in (
        (got.boundary, expected),
        (residual, torch.stack([change.square().mean(-1), size.square().mean(-1)], 1)),
    ):
        torch.testing.assert_close(
            actual.cpu().double(), wanted, rtol=FLOAT64_RTOL, atol=FLOAT64_ATOL
        )


def test_worked_example(backend: str, device: str) -> None:
    """d = [[1, 0], [2, -4]]; x' = [10, 20] + 0.5 d_0 + 3 d_1."""
    got = Arguments(
        boundary=torch.tensor([[[16.5, 6.0]]], device=device),
        fine=torch.tensor([[[10.0, 20.0]]], device=device),
        new=torch.tensor([[[2.0, 7.0], [3.0, 1.0]]], device=device),
        old=torch.tensor([[[1.0, 7.0], [1.0, 5.0]]], device=device),
        coefficients=torch.tensor([[[0.5, 3.0]]], device=device),
    )
    assert kernels.difference_gram(got.new, got.old).tolist() == [[[1.0, 2.0], [2.0, 20.0]]]
    residual = kernels.parareal_correct_(*got)
    assert got.boundary.tolist() == [[[16.5, 8.0]]]
    assert residual.tolist() == [[2.0, (16.5**2 + 64) / 2]]


def test_the_correction_is_summed_before_fine_is_added(backend: str, device: str) -> None:
    """1 + (1e8 - 1e8) is 1; (1 + 1e8) - 1e8 would be 0."""
    got = Arguments(
        boundary=torch.zeros(1, 1, 20, device=device),
        fine=torch.ones(1, 1, 20, device=device),
        new=torch.ones(1, 2, 20, device=device),
        old=torch.zeros(1, 2, 20, device=device),
        coefficients=torch.tensor([[[1e8, -1e8]]], device=device),
    )
    kernels.parareal_correct_(*got)
    assert (got.boundary == 1).all()


@pytest.mark.parametrize("D", [1, 129, 1300])
@pytest.mark.parametrize("coefficient", [1.0, -2.0, 0.0, INF, NAN])
def test_equal_inputs_give_fine_bit_for_bit(
    backend: str, device: str, D: int, coefficient: float
) -> None:
    got = Case(D=D, n=2, R=2).arguments().copy(device)
    got.fine.view(-1)[: min(D, 4)] = torch.tensor([-0.0, 1e-45, -1e-40, INF])[:D].to(device)
    got.new[..., 1::5] = -0.0
    got.old.copy_(got.new)
    got.old[..., 1::5] = 0.0  # -0 and +0 are equal
    got.coefficients.fill_(coefficient)
    kernels.parareal_correct_(*got)
    assert torch.equal(bits(got.boundary), bits(got.fine))
    assert not kernels.difference_gram(got.new, got.old).view(torch.int32).any()
    assert not kernels.difference_gram(got.new, got.new).view(torch.int32).any()


def test_one_zero_coefficient_keeps_nan_out_of_its_register_only(backend: str, device: str) -> None:
    got = Case(D=33, n=1, R=2).arguments().copy(device)
    got.coefficients[0, 0, 2] = 0.0  # register 0 does not use the model output; register 1 does
    got.new[0, 2] = NAN
    residual = kernels.parareal_correct_(*got)
    assert got.boundary[0, 0].isfinite().all() and residual.isfinite().all()
    assert got.boundary[0, 1].isnan().all()


def test_nan_reaches_its_own_element_only(backend: str, device: str) -> None:
    got = Case(D=129, n=2, R=1).arguments().copy(device)
    clean = got.copy()
    got.new[1, 0, 77] = NAN
    residual = kernels.parareal_correct_(*got)
    kernels.parareal_correct_(*clean)
    assert got.boundary[1, 0, 77].isnan()
    got.boundary[1, 0, 77] = clean.boundary[1, 0, 77]
    assert torch.equal(bits(got.boundary), bits(clean.boundary))
    assert residual.isnan().any(1).tolist() == [False, True]


@pytest.mark.parametrize("D", [129, 4096])
def test_bits_do_not_depend_on_the_other_rows(backend: str, device: str, D: int) -> None:
    together = Case(D=D, n=3, R=2).arguments().copy(device)
    apart = together.copy()
    gram = kernels.difference_gram(together.new, together.old)
    residual = kernels.parareal_correct_(*together)
    for i in range(3):
        row = apart.row(i)
        assert torch.equal(bits(kernels.difference_gram(row.new, row.old)[0]), bits(gram[i]))
        assert torch.equal(bits(kernels.parareal_correct_(*row)[0]), bits(residual[i]))
    assert torch.equal(bits(apart.boundary), bits(together.boundary))


def test_bits_do_not_depend_on_the_alignment(backend: str, device: str) -> None:
    aligned = Case(D=1300, n=2, R=2).arguments().copy(device)
    shifted = aligned.copy(offset=1)
    grams = [kernels.difference_gram(a.new, a.old) for a in (aligned, shifted)]
    residuals = [kernels.parareal_correct_(*a) for a in (aligned, shifted)]
    assert torch.equal(bits(grams[0]), bits(grams[1]))
    assert torch.equal(bits(residuals[0]), bits(residuals[1]))
    assert torch.equal(bits(aligned.boundary), bits(shifted.boundary))


def test_a_second_call_gives_the_same(backend: str, device: str) -> None:
    """Scratch memory is left as it was found, whatever the sizes of the calls between."""
    first = Case(D=1300, n=1, R=1).arguments().copy(device)
    second = first.copy()
    wanted = (kernels.difference_gram(*first[2:4]), kernels.parareal_correct_(*first))
    between = Case(D=129, n=3, R=2).arguments().copy(device)
    kernels.difference_gram(*between[2:4])
    kernels.parareal_correct_(*between)
    got = (kernels.difference_gram(*second[2:4]), kernels.parareal_correct_(*second))
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(bits(a), bits(b))
