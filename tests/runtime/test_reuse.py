"""Reuse rules: exact on polynomials of their degree, whatever the spacing."""

import math

import numpy as np
import pytest

from sidestep.runtime.methods.reuse import HISTORY, coordinates, reuse_weights

LAMBDA = np.array([-4.0, -3.1, -2.7, -2.0, -0.9, -0.2, 0.1, 1.4, 2.0, math.inf])
DEGREES = [("hold", 0), ("linear", 1), ("quadratic", 2)]


def applied(rule: str, degree: int, computed: list[int], wanted: int, places: np.ndarray) -> float:
    """The rule's value at the wanted step less the polynomial's, which has the given degree."""
    polynomial = np.polynomial.Polynomial([0.7, -1.3, 0.4][: degree + 1])
    log_snr = None if places is STEPS else places.tolist()
    weights = reuse_weights(rule, computed, wanted, log_snr)
    values = [polynomial(places[step]) for step in computed[: len(weights)]]
    return float(np.dot(weights, values) - polynomial(places[wanted]))


STEPS = np.arange(10.0)


@pytest.mark.parametrize("rule, degree", DEGREES)
@pytest.mark.parametrize("places", [STEPS, LAMBDA], ids=["steps", "lambda"])
@pytest.mark.parametrize("computed, wanted", [([3, 2, 1], 4), ([4, 3, 0], 7), ([6, 2, 1], 8)])
def test_polynomials_are_reproduced(
    rule: str, degree: int, places: np.ndarray, computed: list[int], wanted: int
) -> None:
    assert abs(applied(rule, degree, computed, wanted, places)) < 1e-12


@pytest.mark.parametrize("rule, degree", DEGREES[:2])
def test_one_degree_more_is_not_reproduced(rule: str, degree: int) -> None:
    assert abs(applied(rule, degree + 1, [4, 3, 0], 7, LAMBDA)) > 0.1


def test_known_weights() -> None:
    assert reuse_weights("hold", [5, 4, 3], 7) == (1.0,)
    assert reuse_weights("linear", [5, 4, 3], 6) == (2.0, -1.0)
    assert reuse_weights("linear", [5, 2], 7) == pytest.approx((5 / 3, -2 / 3), abs=1e-15)
    assert reuse_weights("quadratic", [5, 4, 3], 6) == (3.0, -3.0, 1.0)
    ratio = (-0.2 + 0.9) / (-0.9 + 2.0)
    by_lambda = reuse_weights("linear", [4, 3], 5, LAMBDA.tolist())
    assert by_lambda == pytest.approx((1 + ratio, -ratio), abs=1e-15)


def test_interleave_extrapolates_and_holds_in_turn() -> None:
    weights = [reuse_weights("interleave", [5, 2], wanted, LAMBDA.tolist()) for wanted in (6, 7, 8)]
    assert weights == [(2.0, -1.0), (1.0,), (2.0, -1.0)]


@pytest.mark.parametrize("rule", HISTORY)
def test_fewer_outputs_than_the_rule_looks_at(rule: str) -> None:
    assert reuse_weights(rule, [0], 1) == (1.0,)
    line = reuse_weights(rule, [1, 0], 2)
    assert line == ((1.0,) if rule == "hold" else (2.0, -1.0))


def test_lambda_is_used_only_where_it_can_be() -> None:
    known = LAMBDA.tolist()
    assert coordinates([3, 2], 4, known) == ([-2.0, -2.7], -0.9)
    assert coordinates([8, 7], 9, known) == ([8.0, 7.0], 9.0)  # infinite at the end
    assert coordinates([8, 7], 9, known[:9]) == ([8.0, 7.0], 9.0)  # not known there
    assert coordinates([3, 2], 4, None) == ([3.0, 2.0], 4.0)
    assert coordinates([2, 1], 3, [0.0, 1.0, 1.0, 2.0]) == ([2.0, 1.0], 3.0)  # a repeated time
