"""The stepwise driver on small functions: which rows run, what is gathered, what is given back."""

from typing import Any

import pytest
import torch
from scripts import Script
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criterion import Course, Observation
from sidestep.runtime.stepwise import Stepwise

ROWS = 3


class Model:
    """Returns 2 x + context, and remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, x: Tensor, *args: Any, context: Tensor | float = 0.0, **kwargs: Any) -> Any:
        self.calls.append(((x, *args), {"context": context, **kwargs}))
        return (2 * x + context,)

    @property
    def rows(self) -> list[int]:
        return [len(args[0]) for args, _ in self.calls]


def latents(seed: int, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 4, 2, 2, generator=torch.Generator().manual_seed(seed))


def drive(driver: Stepwise, model: Any, steps: int, branches: int = 1) -> list[Tensor]:
    """The loop of a host; returns the model outputs that it saw."""
    driver.begin(Course(steps=steps))
    seen = []
    for k in range(steps):
        x = latents(k)
        seen.append(driver.predict(model, (torch.cat([x] * branches),), {})[0].clone())
        driver.observe(x, latents(k + 1))
    return seen


def test_only_rows_that_compute_are_called_and_the_rest_is_held() -> None:
    driver, model = Stepwise(Script(["###", "###", "#.#", "...", ".#."], history=1)), Model()
    seen = drive(driver, model, 5)
    assert model.rows == [3, 3, 2, 1]
    for k, source in enumerate([(0, 0, 0), (1, 1, 1), (2, 1, 2), (2, 1, 2), (2, 4, 2)]):
        for row, origin in enumerate(source):
            assert torch.equal(seen[k][row], 2 * latents(origin)[row]), (k, row)
    summary = driver.summary()
    assert summary.skip_map == (
        (True, True, True, False, False),
        (True, True, False, False, True),
        (True, True, True, False, False),
    )
    assert summary.nfe == (3.0, 3.0, 3.0)
    assert (summary.ticks, summary.steps, summary.note) == (4, 5, "")


def test_all_guidance_branches_of_a_row_go_together() -> None:
    driver, model = Stepwise(Script(["###", "###", "..#"], history=1)), Model()
    seen = drive(driver, model, 3, branches=2)
    assert model.rows == [6, 6, 2]
    given = model.calls[-1][0][0]
    assert torch.equal(given, latents(2)[[2, 2]])
    for half in seen[2].chunk(2):
        assert torch.equal(half[:2], 2 * latents(1)[:2])
        assert torch.equal(half[2], 2 * latents(2)[2])


def test_arguments_reach_the_model_untouched_when_all_rows_compute() -> None:
    driver, model = Stepwise(Script(["###"], history=1)), Model()
    x, context = latents(0), torch.zeros(ROWS, 1, 1, 1)
    driver.begin()
    driver.predict(model, (x, 981), {"context": context})
    args, kwargs = model.calls[0]
    assert args[0] is x and args[1] == 981 and kwargs["context"] is context


def test_keyword_inputs_and_nested_arguments() -> None:
    def model(*, hidden_states: Tensor, timestep: Tensor, extra: dict) -> dict:
        counts.append((len(hidden_states), len(timestep), len(extra["ids"])))
        return {"out": hidden_states + extra["ids"]}

    counts: list[tuple[int, ...]] = []
    driver = Stepwise(Script(["##", ".#"], history=1))
    for k in range(2):
        x = torch.full((2, 3), float(k))
        arguments = {
            "hidden_states": torch.cat([x, x]),
            "timestep": torch.full((4,), 10),
            "extra": {"ids": torch.arange(4.0)[:, None]},
        }
        output = driver.predict(model, (), arguments)
        driver.observe(x, x + 1)
    assert counts == [(4, 4, 4), (2, 2, 2)]
    assert output["out"].tolist() == [[0.0] * 3, [2.0] * 3, [2.0] * 3, [4.0] * 3]


def test_writing_into_a_result_does_not_reach_what_is_held() -> None:
    driver, model = Stepwise(Script(["###", "...", "#..", "..."], history=1)), Model()
    for k in range(4):
        x = latents(k)
        output = driver.predict(model, (x,), {})[0]
        expected = torch.stack([2 * latents(2 if k >= 2 else 0)[0], *(2 * latents(0)[1:])])
        assert torch.equal(output, expected)
        output += 100
        driver.observe(x, latents(k + 1))


def test_separate_calls_for_the_branches_of_one_step() -> None:
    driver, model = Stepwise(Script(["###", ".##"], history=1)), Model()
    for k in range(2):
        x = latents(k)
        cond = driver.predict(model, (x,), {"context": torch.ones(ROWS, 1, 1, 1)})[0]
        uncond = driver.predict(model, (x,), {"context": torch.zeros(ROWS, 1, 1, 1)})[0]
        driver.observe(x, latents(k + 1))
    assert model.rows == [3, 3, 2, 2]
    assert (
        torch.equal(cond - uncond, torch.ones_like(cond)) or (cond - uncond - 1).abs().max() < 1e-6
    )
    assert torch.equal(uncond[0], 2 * latents(0)[0])
    assert driver.summary().nfe == (1.0, 2.0, 2.0)
    assert driver.summary().ticks == 4


@pytest.mark.parametrize("change", ["guidance off", "resolution", "dtype"])
def test_a_changed_batch_is_computed_in_full(change: str) -> None:
    driver, model = Stepwise(Script(["###", "...", "...", "..."], history=1)), Model()
    for k in range(4):
        x = latents(k)
        given = torch.cat([x, x])
        if k >= 2:
            given = {"guidance off": x, "resolution": given[..., :1], "dtype": given.double()}[
                change
            ]
        output = driver.predict(model, (given,), {})[0]
        assert output.shape == given.shape and output.dtype == given.dtype
        driver.observe(x, latents(k + 1))
    assert len(model.calls) == 2
    assert model.rows == [6, 3 if change == "guidance off" else 6]
    assert driver.summary().reasons == (("warm-up", "skipped", "batch changed", "skipped"),) * 3
    assert driver.summary().skip_map == ((True, False, True, False),) * 3


def test_other_rows_in_the_middle_start_afresh() -> None:
    driver, model = Stepwise(Script(["###", "...", "..."], history=1)), Model()
    driver.begin(Course(steps=6))
    for k, rows in enumerate([3, 3, 2, 2]):
        x = latents(k, rows)
        output = driver.predict(model, (x,), {})[0]
        assert len(output) == rows
        driver.observe(x, x + 1)
    assert model.rows == [3, 2, 2]
    assert driver.summary().reasons == (("warm-up", "no output to reuse"),) * 2


def test_outputs_that_cannot_be_cut_into_rows_are_never_reused() -> None:
    class Opaque:
        pass

    for extra in (Opaque(), torch.tensor(1.0), torch.ones(5), "text"):
        calls = []

        def model(x: Tensor, extra: Any = extra, calls: list = calls) -> Any:
            calls.append(len(x))
            return x, extra

        driver = Stepwise(Script(["###", "...", "#.."], history=1))
        drive_pairs = [latents(0), latents(1), latents(2)]
        for x in drive_pairs:
            assert torch.equal(driver.predict(model, (x,), {})[0], x)
            driver.observe(x, x + 1)
        assert calls == [3, 3, 3]
        assert "no output to reuse" in driver.summary().note


def test_a_model_that_returns_other_rows_is_an_error() -> None:
    driver = Stepwise(Script(["###", "#.."], history=1))
    driver.predict(lambda x: x, (latents(0),), {})
    driver.observe(latents(0), latents(1))
    with pytest.raises(RuntimeError, match=r"given 1 of 3 rows and returned \[\[3, 4, 2, 2\]\]"):
        driver.predict(lambda x: latents(7), (latents(1),), {})


def test_nothing_survives_a_generation() -> None:
    model = Model()
    driver = Stepwise(Script(["###", "..."], history=1))
    drive(driver, model, 2)
    driver.begin()
    driver.predict(model, (latents(9),), {})  # a host that fails here
    seen = drive(driver, model, 2)
    assert model.rows == [3, 3, 3]
    assert torch.equal(seen[1], 2 * latents(0))


def test_a_planned_generation_ends_with_its_last_step() -> None:
    model = Model()
    driver = Stepwise(Script(["###", "...", "..."], history=1))
    drive(driver, model, 2)
    driver.predict(model, (latents(5),), {})
    assert model.rows == [3, 3]  # not the held output of the generation that is over
    assert driver.summary().steps == 2


def test_a_failing_call_may_be_tried_again() -> None:
    def fails(x: Tensor) -> Tensor:
        raise MemoryError

    driver, model = Stepwise(Script(["###", "###", "..."], history=1)), Model()
    for k in range(3):
        if k == 1:
            with pytest.raises(MemoryError):
                driver.predict(fails, (latents(k),), {})
        output = driver.predict(model, (latents(k),), {})[0]
        driver.observe(latents(k), latents(k + 1))
    assert torch.equal(output, 2 * latents(1))
    assert driver.summary().ticks == 2


def test_calls_without_a_scheduler_hold_nothing() -> None:
    driver, model = Stepwise(Script(["###"], history=1)), Model()
    for k in range(50):
        driver.predict(model, (latents(k),), {})
    assert len(model.calls) == 50
    assert sum(map(len, driver._generation.calls.values())) == 8


def test_step_sizes_are_per_row_means_in_float32() -> None:
    x = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    x_next = torch.full_like(x, 0.5)
    x_next[1] = -1.5
    seen = Observation(step=0, x=x, x_next=x_next, output=None, computed=[True, True])
    assert seen.delta.dtype == torch.float32 and seen.delta.tolist() == [0.5, 1.5]


def test_step_sizes_of_the_scheduler_are_used_where_it_has_them() -> None:
    driver, model = Stepwise(Script(["###", "###", "###"], history=1, shows_value=True)), Model()
    buffer = torch.zeros(3)
    for k in range(3):
        driver.predict(model, (latents(k),), {})
        buffer += torch.tensor([1.0, 2.0, 3.0])  # a kernel's own, written again at every step
        driver.observe(latents(k), latents(k + 1), step_sizes=buffer)
    assert [row[1:] for row in driver.summary().criterion] == [(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]


class CountReads(TorchFunctionMode):
    """Counts what would make the host wait for a device."""

    READS = ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero")
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.READS
        return func(*args, **(kwargs or {}))


def test_one_host_read_per_step_and_none_in_the_warm_up() -> None:
    driver, model = Stepwise(Adaptive(mode="paper", threshold=0.5, max_skip=2).criterion()), Model()
    driver.begin(Course(steps=12))
    reads = []
    for k in range(12):
        with CountReads() as mode:
            driver.predict(model, (latents(k),), {})
            driver.observe(latents(k), latents(k + 1))
        reads.append(mode.count)
    assert reads == [0, 0, 0] + [1] * 8 + [0]
    assert sum(driver.summary().nfe) < 36


def large_tensors(driver: Stepwise) -> list[Tensor]:
    """All that it keeps with more than a number for every row, wherever it is."""
    seen: dict[int, Any] = {}
    found = [driver]
    while found:
        obj = found.pop()
        if id(obj) not in seen and not isinstance(obj, type):
            seen[id(obj)] = obj
            found += obj.values() if isinstance(obj, dict) else []
            found += obj if isinstance(obj, list | tuple) else []
            found += vars(obj).values() if hasattr(obj, "__dict__") else []
    return [obj for obj in seen.values() if isinstance(obj, Tensor) and obj.numel() > ROWS]


@pytest.mark.parametrize("mode", ["error-control", "elementwise", "features"])
@pytest.mark.parametrize("steps", [12, None], ids=["last step", "release"])
def test_nothing_as_large_as_the_latents_outlives_a_generation(
    mode: str, steps: int | None
) -> None:
    driver, model = Stepwise(Adaptive(mode=mode).criterion()), Model()
    driver.begin(Course(steps=steps))
    for k in range(12):
        output = driver.predict(model, (latents(k),), {})[0]
        assert k < 2 or large_tensors(driver)
        driver.observe(latents(k), latents(k + 1), output)
    if steps is None:
        driver.release()
    assert not large_tensors(driver)
    assert driver.summary().steps == 12


def test_a_criterion_keeps_no_graph_alive() -> None:
    """A loop of one's own without `torch.no_grad`."""
    weight = torch.ones(1, requires_grad=True)
    driver = Stepwise(Adaptive(threshold=0.0).criterion())
    x = latents(0)
    for _ in range(6):
        output = driver.predict(lambda x: x * weight, (x,), {})
        x_next = x + 0.1 * output
        driver.observe(x, x_next, output)
        x = x_next
    assert x.requires_grad
    values = [step.value for step in driver._generation.steps if step.value is not None]
    decided = driver._generation.decision
    assert values and decided is not None and decided.value is not None
    outputs = vars(driver.criterion)["reused"].kept.outputs
    assert outputs
    kept = [*values, decided.value, *outputs]
    assert not any(value.requires_grad for value in kept)


def test_summary_says_why_nothing_was_skipped() -> None:
    driver = Stepwise(Adaptive(mode="paper", threshold=0).criterion(), method="Adaptive")
    assert driver.summary().note == "no generation has run yet"
    drive(driver, Model(), 4)
    assert driver.summary().note == "nothing was skipped: of 12 calls 12 by warm-up"
    drive(driver, Model(), 7)
    note = driver.summary().note
    assert note.startswith(
        "nothing was skipped: of 21 calls 12 by warm-up, 9 by criterion; smallest"
    )
    driver.begin()
    assert driver.summary().steps == 7  # until the next one has a step
    lost = Stepwise(Adaptive().criterion())
    lost.begin(Course(steps=2))
    lost.observe(latents(0), latents(1))
    assert "stepped 1 times without a call" in lost.summary().note


def test_summary_as_text() -> None:
    driver = Stepwise(Script(["###", "..#", "###"], history=1), method="Script")
    drive(driver, Model(), 3)
    lines = str(driver.summary()).splitlines()
    assert lines[0] == (
        "Script: 3 steps, 3 images, 2.3 model calls per image (1.29x fewer), 3 sequential calls"
    )
    assert lines[1] == "  image 0  #.#  2 calls: 1 warm-up, 1 skipped, 1 criterion"
    assert lines[3] == "  image 2  ###  3 calls: 1 warm-up, 2 criterion"
