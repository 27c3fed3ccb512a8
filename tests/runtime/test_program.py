"""`Program`: linear forms, and the pass that drops, merges and places registers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sidestep.runtime.plan import Plan
from sidestep.runtime.program import Form, Program


def _values(form: Form, values: dict[str, float]) -> float:
    return sum(c * values[s] for s, c in form.items())


def test_forms_are_linear() -> None:
    x, u = Program.x, Program.u
    values = {"x": 3.0, "u": 5.0}
    assert _values(2 * x - u / 4 + x, values) == 3 * 3.0 - 5.0 / 4
    assert _values(-(x + u), values) == -8.0
    assert x + u == Form({"x": 1.0, "u": 1.0})
    assert Program.x == {"x": 1.0}


def test_a_program_without_state_is_a_table_of_two_columns() -> None:
    program = Program("one", initial_scale=2.5)
    for k in range(3):
        program.step(10.0 - k, x=0.5 * program.x + k * program.u, scale=0.1 * (k + 1), log_snr=k)
    plan = program.plan()
    np.testing.assert_array_equal(plan.matrices, [[[0.5, 0]], [[0.5, 1]], [[0.5, 2]]])
    np.testing.assert_array_equal(plan.timesteps, [10, 9, 8])
    np.testing.assert_allclose(plan.input_scales, [0.1, 0.2, 0.3])
    np.testing.assert_array_equal(plan.log_snr, [0, 1, 2])
    assert (plan.name, plan.initial_scale, plan.errors) == ("one", 2.5, None)


def test_registers_that_nobody_reads_are_dropped() -> None:
    program = Program("dead")
    junk = program.register("junk")
    for k in range(4):
        kept = junk + program.u if k else program.u
        program.step(k, x=program.x + program.u, junk=kept)
    assert program.plan().registers == 1


def test_registers_that_hold_the_same_value_are_one() -> None:
    program = Program("twins")
    a, b = program.register("a"), program.register("b")
    program.step(0, x=program.x, a=program.u, b=program.u)
    program.step(1, x=program.x + a - 0.25 * b)
    plan = program.plan()
    assert plan.registers == 2
    np.testing.assert_array_equal(plan.matrices[1, 0], [1, 0.75, 0])


def test_a_register_that_equals_the_latent_is_the_latent() -> None:
    program = Program("shadow")
    program.step(0, x=2 * program.x, last=2 * program.x)
    program.step(1, x=program.x + program.register("last"))
    np.testing.assert_array_equal(program.plan().matrices, [[[2, 0]], [[2, 0]]])


def test_the_shift_of_a_history_is_an_identity() -> None:
    """Third order keeps two outputs: each step writes one of them and moves none."""
    program = Program("3M")
    x, u = program.x, program.u
    m1, m2 = program.register("m1"), program.register("m2")
    for k in range(8):
        older = [Form(), 0.5 * m1, 0.5 * m1 + 0.25 * m2][min(k, 2)]
        program.step(k, x=x + u + older, m1=u, **({"m2": m1} if k else {}))
    plan = program.plan()
    assert plan.registers == 3
    identity = (plan.matrices[:, 1:] == np.eye(3, 4)[None, 1:]).all(axis=2)
    assert identity.sum(axis=1).tolist() == [1, 1, 1, 1, 1, 1, 1, 2]
    for k in range(2, 8):  # the oldest output is read from where it was written
        older = sorted(c for c in plan.matrices[k, 0, 1:3])
        assert older == [0.25, 0.5]


def test_noise_draws_and_errors_have_their_columns() -> None:
    program = Program("noisy")
    program.step(0, x=program.x + program.noise(1), error=program.u - program.x, draws=3)
    program.step(1, x=program.x + 2 * program.noise(), draws=1)
    plan = program.plan()
    np.testing.assert_array_equal(plan.matrices[:, 0], [[1, 0, 0, 1, 0], [1, 0, 2, 0, 0]])
    np.testing.assert_array_equal(plan.errors, [[-1, 1, 0, 0, 0], [0] * 5])
    assert plan.draws.tolist() == [3, 1]


def test_a_register_for_the_error_alone_is_kept() -> None:
    program = Program("embedded")
    m = program.register("m")
    program.step(0, x=program.x, m=program.u)
    program.step(1, x=program.x, error=m - program.u)
    plan = program.plan()
    np.testing.assert_array_equal(plan.errors[1], [0, 1, -1])
    np.testing.assert_array_equal(plan.matrices[0, 1], [0, 0, 1])


def test_an_empty_program_is_an_empty_plan() -> None:
    plan = Program("nothing").plan()
    assert (len(plan), plan.registers) == (0, 1)


def test_reading_before_writing_is_an_error() -> None:
    program = Program("early")
    program.step(0, x=program.x + program.register("m"), m=program.u)
    with pytest.raises(ValueError, match=r"Program early: \['m'\] are read before being written"):
        program.plan()


def test_reading_what_was_not_kept_is_an_error() -> None:
    program = Program("lost")
    program.step(0, x=program.x, m=program.u)
    program.step(1, x=program.x)
    program.step(2, x=program.x + program.register("m"))
    with pytest.raises(ValueError, match="register 'm' is read but was not kept"):
        program.plan()


@pytest.mark.parametrize("name", ["x", "u", "noise0"])
def test_names_that_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is taken"):
        Program("p").register(name)


def test_too_many_registers_is_an_error() -> None:
    program = Program("wide")
    names = [f"m{i}" for i in range(6)]
    program.step(0, x=program.x, **{n: (i + 1) * program.u for i, n in enumerate(names)})
    program.step(1, x=sum((program.register(n) for n in names), Form()))
    with pytest.raises(ValueError, match="7 registers, expected at most 6"):
        program.plan()


def _random_program(random: np.random.Generator) -> tuple[Program, list[dict[str, Form]]]:
    """Up to four registers, kept, copied, combined or left unwritten at random."""
    program, steps = Program("random"), []
    names: list[str] = []
    for k in range(int(random.integers(1, 9))):
        symbols = ["x", "u", "noise0", *names]

        def combination(symbols: list[str] = symbols) -> Form:
            if random.random() < 0.4:
                return Form({str(random.choice(symbols)): 1.0})
            chosen = random.choice(symbols, size=2)
            return Form({str(s): float(random.integers(-2, 3)) for s in chosen})

        forms = {f"m{i}": combination() for i in range(4) if random.random() < 0.8}
        forms["x"] = combination()
        program.step(k, **forms)
        names = [n for n in forms if n != "x"]
        steps.append(forms)
    return program, steps


def _interpret(steps: list[dict[str, Form]], inputs: np.ndarray) -> list[float]:
    state, latents = {"x": float(inputs[0, 0])}, []
    for forms, (_, u, z) in zip(steps, inputs, strict=True):
        values = {**state, "u": u, "noise0": z}
        state = {name: _values(form, values) for name, form in forms.items()}
        latents.append(state["x"])
    return latents


def _execute(plan: Plan, inputs: np.ndarray) -> list[float]:
    state, latents = np.full(plan.registers, np.nan), []
    state[0] = inputs[0, 0]
    for matrix, (_, u, z) in zip(plan.matrices, inputs, strict=True):
        values: Any = [*state, u, z][: matrix.shape[1]]
        state = np.array([sum(c * v for c, v in zip(r, values, strict=True) if c) for r in matrix])
        latents.append(float(state[0]))
    return latents


def test_random_programs_mean_the_same_as_their_plans() -> None:
    """Unwritten registers hold NaN here, so the plan may not read them either."""
    random = np.random.default_rng(3)
    for _ in range(300):
        program, steps = _random_program(random)
        inputs = random.standard_normal((len(steps), 3))
        np.testing.assert_allclose(
            _execute(program.plan(), inputs), _interpret(steps, inputs), rtol=1e-12, atol=1e-12
        )
