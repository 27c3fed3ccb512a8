"""What a row that skips goes on with: weights of its computed outputs, an offset, a plain copy."""

import numpy as np
import pytest
import torch
from scripts import Script
from torch import Tensor

from sidestep.runtime.held import HeldOutput
from sidestep.runtime.methods.criterion import Course
from sidestep.runtime.stepwise import Stepwise


def latents(k: int, rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(k))
    return made.to(dtype)


def drive(
    script: Script, steps: int, branches: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Stepwise, list[Tensor]]:
    """Runs the model ``u = 2 x`` on ``latents(k)``; returns the outputs that the host got."""
    driver, outputs = Stepwise(script), []
    driver.begin(Course(steps=steps))
    for k in range(steps):
        x = latents(k, dtype=dtype)
        given = torch.cat([x + branch for branch in range(branches)])
        outputs.append(driver.predict(lambda x: (2 * x,), (given,), {})[0])
        driver.observe(x, latents(k + 1, dtype=dtype))
    return driver, outputs


def u(k: int, row: int) -> Tensor:
    return 2 * latents(k)[row]


def test_each_row_combines_its_own_last_outputs() -> None:
    weights = [(2.0, -1.0), np.array([3.0, -3.0, 1.0])]  # whatever the numbers are kept in
    script = Script(["##", "##", "#.", "##", ".."], {2: [(), (2.0, -1.0)], 4: weights})
    driver, outputs = drive(script, 5)
    assert torch.equal(outputs[2], torch.stack([u(2, 0), 2 * u(1, 1) - u(0, 1)]))
    assert torch.equal(outputs[4][0], 2 * u(3, 0) - u(2, 0))
    assert torch.equal(outputs[4][1], 3 * u(3, 1) + -3 * u(1, 1) + u(0, 1))  # not its own guess
    assert driver.summary().nfe == (4.0, 3.0)


def test_the_ring_turns_for_as_long_as_it_likes() -> None:
    marks = ["##"] + ["#.", ".#", "##"] * 5 + [".."]
    script = Script(marks, {16: [(0.5, 0.25, 0.125), (0.0, 0.0, 1.0)]})
    _, outputs = drive(script, 17)
    assert torch.equal(outputs[16][0], 0.5 * u(15, 0) + 0.25 * u(13, 0) + 0.125 * u(12, 0))
    assert torch.equal(outputs[16][1], u(12, 1))


def test_memory_is_one_ring_however_long_the_run() -> None:
    driver = Stepwise(Script(["##"] * 40))
    driver.begin()
    rings = set()
    for k in range(40):
        driver.predict(lambda x: x, (latents(k),), {})
        ((call,),) = driver._generation.calls.values()
        rings.add((call.held.rings.shape, call.held.rings.data_ptr()))
        driver.observe(latents(k), latents(k + 1))
    assert [shape for shape, _ in rings] == [torch.Size([6, 3, 4])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_holding_is_a_plain_copy_and_weights_are_formed_in_fp32(dtype: torch.dtype) -> None:
    script = Script(["##", "##", "..", ".."], {2: None, 3: [(1.5, -0.5), ()]})
    _, outputs = drive(script, 4, dtype=dtype)
    assert torch.equal(outputs[2], 2 * latents(1, dtype=dtype))
    newest, older = (2 * latents(k, dtype=dtype)[0] for k in (1, 0))
    wide = torch.promote_types(dtype, torch.float32)
    expected = (1.5 * newest.to(wide) - 0.5 * older.to(wide)).to(dtype)
    assert outputs[3].dtype == dtype and torch.equal(outputs[3][0], expected)
    assert torch.equal(outputs[3][1], 2 * latents(1, dtype=dtype)[1])


def test_not_a_number_is_held_as_it_is_and_stays_in_its_row() -> None:
    held = HeldOutput.of(latents(0), latents(0), history=2)
    assert held is not None
    poisoned = latents(1)
    poisoned[0] = float("nan")
    held.put(poisoned, [0, 1], 1)
    output = held.reuse({1: (2.0, -1.0)})
    assert output[0].isnan().all()
    assert torch.equal(output[1], 2 * latents(1)[1] - latents(0)[1])
    assert torch.equal(held.reuse({0: (0.0, 1.0)})[1], latents(1)[1])


def test_an_offset_goes_to_every_branch_of_the_rows_that_skip() -> None:
    offset = torch.full((2, 3, 4), 100.0)
    script = Script(["##", "#.", ".."], {2: [(2.0, -1.0), ()]}, {1: offset, 2: offset})
    _, outputs = drive(script, 3, branches=2)
    for branch in (0, 1):
        first, second = outputs[1].chunk(2)[branch], outputs[2].chunk(2)[branch]
        at = [2 * (latents(k) + branch) for k in range(3)]
        assert torch.equal(first, torch.stack([at[1][0], at[0][1] + 100]))
        assert torch.equal(second[0], 2 * at[1][0] - at[0][0] + 100)
        assert torch.equal(second[1], at[0][1] + 100)


def test_an_offset_goes_to_the_channels_of_the_latents() -> None:
    """A model with a learned variance returns twice as many."""
    driver = Stepwise(Script(["##", ".."], offsets={1: torch.ones(2, 3, 4)}))
    for k in range(2):
        output = driver.predict(lambda x: torch.cat([x, -x], dim=1), (latents(k),), {})
        driver.observe(latents(k), latents(k + 1))
    assert torch.equal(output, torch.cat([latents(0) + 1, -latents(0)], dim=1))


def test_an_offset_without_a_place_is_computed() -> None:
    driver = Stepwise(Script(["##", ".#"], offsets={1: torch.ones(2, 3, 5)}))
    for k in range(2):
        output = driver.predict(lambda x: x, (latents(k),), {})
        driver.observe(latents(k), latents(k + 1))
    assert torch.equal(output, latents(1))
    assert driver.summary().reasons[0][1] == "no place for the offset"


def test_too_few_outputs_are_computed_row_by_row() -> None:
    script = Script(["##", ".#", ".."], {1: [(2.0, -1.0), ()], 2: [(2.0, -1.0), (1.0, 1.0, 1.0)]})
    driver, outputs = drive(script, 3)
    assert torch.equal(outputs[1][0], u(1, 0))
    assert torch.equal(outputs[2], torch.stack([2 * u(1, 0) - u(0, 0), u(2, 1)]))
    assert driver.summary().reasons == (
        ("warm-up", "no output to reuse", "skipped"),
        ("warm-up", "criterion", "no output to reuse"),
    )
    assert [seen.computed for seen in script.seen] == [[True, True], [True, True]]


def test_a_call_that_was_left_out_for_some_steps_is_not_stale() -> None:
    """Guidance within an interval: the second call has an older output than the first."""
    driver, called = Stepwise(Script(["##", "##", "..", ".."])), []
    for k in range(4):
        for branch in [0] if k == 1 else [0, 1]:
            driver.predict(
                lambda x, at=(k, branch): called.append(at) or x, (latents(k) + branch,), {}
            )
        driver.observe(latents(k), latents(k + 1))
    assert called == [(0, 0), (0, 1), (1, 0), (2, 1), (3, 0), (3, 1)]


def test_what_the_criterion_sees() -> None:
    script = Script(["##", ".#", "##"])
    driver = Stepwise(script)
    driver.begin(Course(steps=4, log_snr=(-1.0, 0.0, 1.0, 2.0), multistep=True))
    for k in range(3):
        output = driver.predict(lambda x: 2 * x, (latents(k),), {})
        driver.observe(latents(k), latents(k + 1), output, step_sizes=torch.ones(2))
    assert script.course == Course(rows=2, steps=4, log_snr=(-1.0, 0.0, 1.0, 2.0), multistep=True)
    assert [seen.computed for seen in script.seen] == [[True, True], [False, True], [True, True]]
    for k, seen in enumerate(script.seen):
        assert seen.step == k and seen.delta.tolist() == [1.0, 1.0]
        assert torch.equal(seen.x, latents(k)) and torch.equal(seen.x_next, latents(k + 1))
    assert script.seen[1].output is not None
    assert torch.equal(script.seen[1].output, torch.stack([u(0, 0), u(1, 1)]))


def test_a_changed_structure_of_the_output_begins_anew() -> None:
    driver = Stepwise(Script(["##", "##", ".."]))
    for k in range(3):
        model = (lambda x: (x,)) if k == 0 else (lambda x: {"sample": 3 * x})
        output = driver.predict(model, (latents(k),), {})
        driver.observe(latents(k), latents(k + 1))
    assert torch.equal(output["sample"], 3 * latents(1))


def test_the_layout_of_pictures_survives() -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    driver = Stepwise(Script(["##", ".#", "..", ".."], {3: [(2.0, -1.0), ()]}, history=2))
    for _ in range(3):
        output = driver.predict(lambda x: 2 * x, (x,), {})
        assert output.is_contiguous(memory_format=torch.channels_last)
        driver.observe(x, x)


def test_calls_are_told_apart_by_what_they_are_conditioned_on() -> None:
    """Guidance that is switched off leaves the second call of every step alone, and first."""
    uncond, cond = torch.zeros(2, 5, 3), torch.ones(2, 5, 3)
    driver, called = Stepwise(Script(["##", "##", "..", ".."])), []

    def model(x: Tensor, t: int, context: Tensor) -> Tensor:
        called.append(float(context.mean()))
        return x + context[:, :1, :1]

    for k in range(4):
        for context in (uncond, cond) if k < 3 else (cond,):
            output = driver.predict(model, (latents(k), k, context), {})
        driver.observe(latents(k), latents(k + 1))
    assert called == [0, 1, 0, 1]
    assert torch.equal(output, latents(1) + 1)


def test_keys_tell_models_and_branches_apart() -> None:
    driver, called = Stepwise(Script(["##", "..", "..", ".."])), []
    for k, (key, shift) in enumerate([("a", 0), ("a", 0), ("b", 9), ("b", 9)]):
        output = driver.predict(
            lambda x, key=key, shift=shift: called.append(key) or x + shift,
            (latents(k),), {}, key=key,
        )  # fmt: skip
        driver.observe(latents(k), latents(k + 1))
    assert called == ["a", "b"]
    assert torch.equal(output, latents(2) + 9)
    assert driver.summary().reasons[0] == ("warm-up", "skipped", "no output to reuse", "skipped")


def test_a_prompt_that_changes_is_computed() -> None:
    prompts = [torch.zeros(2, 5, 3), torch.ones(2, 5, 3)]
    driver = Stepwise(Script(["##", "..", "..", ".."]))
    for k, prompt in enumerate([0, 0, 1, 1]):
        driver.predict(lambda x, t, c: x, (latents(k), k, prompts[prompt]), {})
        driver.observe(latents(k), latents(k + 1))
    assert driver.summary().reasons[0] == ("warm-up", "skipped", "prompt changed", "skipped")
    driver.begin()
    for k in range(3):  # a host that makes a new tensor at every step says nothing by it
        driver.predict(lambda x, t, c: x, (latents(k), k, prompts[0].clone()), {})
        driver.observe(latents(k), latents(k + 1))
    assert driver.summary().reasons[0] == ("warm-up", "skipped", "skipped")


def test_outputs_for_another_prompt_are_not_extrapolated_from() -> None:
    prompts = [torch.zeros(2, 5, 3), torch.ones(2, 5, 3)]
    line = [(2.0, -1.0)] * 2
    driver = Stepwise(Script(["##", "##", "..", "..", ".."], {k: line for k in (2, 3, 4)}))
    for k, prompt in enumerate([0, 0, 1, 1, 1]):
        output = driver.predict(lambda x, t, c: 2 * x, (latents(k), k, prompts[prompt]), {})
        driver.observe(latents(k), latents(k + 1))
    assert driver.summary().reasons[1][2:] == ("prompt changed", "no output to reuse", "skipped")
    assert torch.equal(output[1], 2 * u(3, 1) - u(2, 1))


def test_a_compiled_model_is_given_sizes_it_knows() -> None:
    driver, sizes = Stepwise(Script(["###", "#..", ".##", "..."])), []

    def model(x: Tensor, context: Tensor) -> Tensor:
        sizes.append(len(x))
        return x + context

    def go(rows: int) -> list[Tensor]:
        driver.begin(Course(steps=4))
        outputs = []
        for k in range(4):
            x, context = latents(k, rows), torch.arange(float(rows)).view(-1, 1, 1)
            outputs.append(driver.predict(model, (x,), {"context": context}, compiled=True))
            driver.observe(x, latents(k + 1, rows))
        return outputs

    first = go(3)
    assert sizes == [3, 3, 3]
    driver.criterion = Script(["##", "#.", ".#", ".."])
    go(2)
    sizes.clear()
    driver.criterion = Script(["###", "#..", ".##", "..."])
    assert all(map(torch.equal, go(3), first)) and sizes == [3, 2, 2]
    own = torch.arange(3.0).view(-1, 1, 1)
    expected = torch.cat([latents(1, 3)[:1], latents(2, 3)[1:]]) + own
    assert torch.equal(first[3], expected)


def test_an_assistant_is_called_for_the_rows_that_the_model_needs() -> None:
    driver = Stepwise(Script(["###", "#..", "...", ".#."], {2: [(2.0, -1.0), (), ()]}))
    rows: dict[str, list[int]] = {"assistant": [], "model": []}

    def assistant(x: Tensor) -> tuple[list[Tensor], Tensor]:
        rows["assistant"].append(len(x))
        return [2 * x], 3 * x

    def model(x: Tensor, hints: list[Tensor], middle: Tensor) -> Tensor:
        assert torch.equal(hints[0], 2 * x) and torch.equal(middle, 3 * x)
        rows["model"].append(len(x))
        return x

    for k in range(4):
        x = latents(k, 3)
        hints, middle = driver.assist(assistant, (x,), {})
        assert len(middle) == 3 and middle.shape == x.shape
        driver.predict(model, (x, hints, middle), {})
        driver.observe(x, latents(k + 1, 3))
    assert rows == {"assistant": [3, 1, 1], "model": [3, 1, 1]}
    assert driver.summary().ticks == 3


def test_frames_that_are_stepped_one_by_one_are_one_row() -> None:
    """Two clips of three frames, guided: the scheduler's batch is 6, the model's 4."""
    clip = torch.zeros(2, 4, 3, 2, 2)
    offset = torch.arange(2.0).view(2, 1, 1, 1, 1).expand_as(clip)
    script = Script(["##", ".."], offsets={1: offset})
    driver = Stepwise(script)
    driver.begin(Course(steps=3))
    for k in range(2):
        x = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(k))
        output = driver.predict(lambda x: x, (torch.cat([x, 9 * x]),), {})
        if k == 0:
            first = x
        frames, sizes = x.transpose(1, 2).flatten(0, 1), torch.arange(6.0)
        driver.observe(frames, frames + 1, frames - 1, step_sizes=sizes)
    assert script.course.rows == 2 and driver.summary().nfe == (1.0, 1.0)
    for k, seen in enumerate(script.seen):
        assert seen.x.shape == clip.shape and seen.delta.tolist() == [1.0, 4.0], k
        assert torch.equal(seen.x_next, seen.x + 1)
        assert seen.output is not None and torch.equal(seen.output, seen.x - 1)
    assert torch.equal(script.seen[0].x, first)
    assert torch.equal(output, torch.cat([first + offset, 9 * first + offset]))


def test_a_call_that_is_differentiated_is_made() -> None:
    """Guidance by a gradient with respect to the latents."""
    driver = Stepwise(Script(["##", "..", ".."]))
    for k in range(3):
        x = latents(k).requires_grad_(k == 1)
        output = driver.predict(lambda x: x**2, (x,), {})
        if k == 1:
            assert torch.equal(torch.autograd.grad(output.sum(), x)[0], 2 * x.detach())
        driver.observe(x.detach(), latents(k + 1))
    assert driver.summary().reasons[0] == ("warm-up", "gradient wanted", "skipped")
    assert torch.equal(output, latents(1) ** 2) and not output.requires_grad


def test_latents_in_a_list_have_no_batch_to_take_rows_of() -> None:
    driver = Stepwise(Script(["##", "..", ".."]))
    for k in range(3):
        output = driver.predict(lambda xs: torch.stack(xs), (list(latents(k)),), {})
        assert torch.equal(output, latents(k))
        driver.observe(latents(k), latents(k + 1))
    assert driver.summary().note == (
        "nothing was skipped: of 6 calls 4 by no batch found, 2 by warm-up"
    )
