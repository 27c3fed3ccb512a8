"""Recorded model calls: any lines of them, each with its own latent and time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sidestep.runtime.denoisers import (
    FromHelper,
    RecordedArguments,
    RecordedCall,
    RecordedDenoiser,
    RecordedStep,
    join_times,
    prediction,
)

ROWS, SHAPE = 3, (2, 4)


class Network:
    """Returns, for every line, a number that tells what that line was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.seen: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, t: Any, text: Tensor, extra: dict[str, Any]) -> tuple[Tensor]:
        self.batches.append(len(x))
        self.seen.append({"x": x, "t": t, "text": text, "extra": extra})
        time = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
        value = time * 10 + text + extra["scale"] * extra["shared"].sum()
        return (x[:, :2] + value.view(-1, 1, 1).to(x.dtype),)


def arguments(network: Any, branches: int = 2, **settings: Any) -> RecordedArguments:
    """Text ``branch + row / 10`` for every line, and a tensor that all lines share."""
    text = torch.tensor([g + r / 10 for g in range(branches) for r in range(ROWS)])
    return RecordedArguments(
        model=network,
        args=(None, None),
        kwargs={"text": text, "extra": {"scale": 1.0, "shared": torch.tensor([0.5, 0.5])}},
        sample=0,
        time=1,
        batch=branches * ROWS,
        **{"dtype": torch.float32, **settings},
    )


def latents(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def expected(x: Tensor, lines: list[tuple[int, int, int]]) -> Tensor:
    """``x + 10 t + text + 1`` with t = 100 - step."""
    value = [10.0 * (100 - step) + branch + row / 10 + 1.0 for step, row, branch in lines]
    return x + torch.tensor(value).view(-1, 1, 1)


def two_branches(network: Network, **settings: Any) -> RecordedDenoiser:
    shared = arguments(network)
    steps = [
        RecordedStep(
            calls=[RecordedCall(arguments=shared, time=torch.tensor(100.0 - k))],
            places={0: (0, 0), 1: (0, 1)},
        )
        for k in range(4)
    ]
    return RecordedDenoiser(rows=ROWS, shape=torch.Size(SHAPE), steps=steps, **settings)


def test_all_lines_of_one_step_are_the_call_of_the_host() -> None:
    network = Network()
    denoiser = two_branches(network)
    lines = [(2, row, branch) for branch in (0, 1) for row in range(ROWS)]
    x = latents(6)
    assert torch.equal(denoiser(x, lines), expected(x, lines))
    call = denoiser.steps[2].calls[0]
    assert network.seen[0]["t"] is call.time
    assert network.seen[0]["text"] is call.arguments.kwargs["text"]
    assert denoiser.ticks == 1


def test_lines_at_their_own_steps_share_a_call() -> None:
    network = Network()
    lines = [(3, 1, 1), (0, 0, 0), (3, 1, 0), (2, 2, 1)]
    x = latents(4)
    torch.testing.assert_close(two_branches(network)(x, lines), expected(x, lines))
    assert network.batches == [4]
    assert network.seen[0]["t"].tolist() == [100.0, 97.0, 97.0, 98.0]  # in the host's order
    torch.testing.assert_close(network.seen[0]["text"], torch.tensor([0.0, 0.1, 1.1, 1.2]))


def test_separate_calls_and_a_branch_that_ends() -> None:
    network = Network()
    first, second = arguments(network, 1), arguments(network, 1)
    both = [RecordedCall(arguments=a, time=100.0) for a in (first, second)]
    one = [RecordedCall(arguments=second, time=99.0)]
    steps = [
        RecordedStep(calls=both, places={0: (0, 0), 1: (1, 0)}),
        RecordedStep(calls=one, places={1: (0, 0)}),
    ]
    denoiser = RecordedDenoiser(rows=ROWS, shape=torch.Size(SHAPE), steps=steps)
    lines = [(0, 0, 0), (0, 0, 1), (1, 2, 0), (1, 2, 1)]
    x = latents(4)
    result = denoiser(x, lines)
    assert network.batches == [1, 2]  # the second branch of both steps in one call
    assert torch.equal(result[2], torch.zeros(SHAPE))  # a branch that step 1 does not have
    same = [(0, 0, 0), (0, 0, 0), (1, 2, 0)]  # both calls were given the same text
    torch.testing.assert_close(result[[0, 1, 3]], expected(x[[0, 1, 3]], same))


def test_an_output_that_is_known_is_not_computed_again() -> None:
    network = Network()
    denoiser = two_branches(network)
    known = latents(6) + 5
    denoiser.steps[0].calls[0].output = torch.cat([known, known], dim=1)  # more channels
    x = latents(3)
    result = denoiser(x, [(0, 2, 1), (1, 2, 1), (0, 0, 0)])
    assert torch.equal(result[[0, 2]], known[[5, 0]])
    torch.testing.assert_close(result[1:2], expected(x[1:2], [(1, 2, 1)]))
    assert denoiser.ticks == 1


def test_more_channels_around_the_latents() -> None:
    network = Network()
    around = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(2))
    around[:, :2] = 0
    made = arguments(network, around=around, region=(1, 0))
    x = latents(2)
    made.call(x, [4, 1], 7.0)
    given = network.seen[0]["x"]
    assert torch.equal(given[:, :2], x)
    assert torch.equal(given[:, 2:], around[[4, 1], 2:])
    assert not bool(around[:, :2].any())  # what is kept is not written into


def test_a_compiled_model_sees_whole_batches_only() -> None:
    network = Network()
    denoiser = two_branches(network)
    for step in denoiser.steps:
        step.calls[0].arguments.whole = True
    lines = [(2, 1, 1), (3, 0, 0)]
    x = latents(2)
    torch.testing.assert_close(denoiser(x, lines), expected(x, lines))
    assert network.batches == [6]


def test_a_helper_is_called_for_the_same_lines_at_the_same_times() -> None:
    network, helper = Network(), Network()
    made = arguments(network)
    made.kwargs["extra"] = {"scale": 1.0, "shared": FromHelper(0, 0)}
    helping = [arguments(helper), arguments(helper)]
    helping[1].kwargs["extra"] = {"scale": 0.0, "shared": torch.tensor([0.5])}
    steps = [
        RecordedStep(
            calls=[
                RecordedCall(
                    arguments=made,
                    time=100.0 - k,
                    helpers=(RecordedCall(arguments=helping[k // 2], time=100.0 - k),),
                )
            ],
            places={0: (0, 0), 1: (0, 1)},
        )
        for k in range(3)
    ]
    denoiser = RecordedDenoiser(rows=ROWS, shape=torch.Size(SHAPE), steps=steps)
    x = latents(3)
    result = denoiser(x, [(0, 1, 1), (2, 1, 0), (1, 2, 0)])
    assert network.batches == helper.batches == [2, 1]  # step 2 has a helper of its own
    assert network.seen[0]["t"].tolist() == helper.seen[0]["t"].tolist() == [99.0, 100.0]
    given = [seen["extra"]["shared"] for seen in network.seen]
    hints = torch.tensor([990.0 + 0.2 + 1, 1000.0 + 1.1 + 1])  # 10 t + text + 1
    torch.testing.assert_close(given[0], x[[2, 0]] + hints.view(-1, 1, 1))
    torch.testing.assert_close(given[1], x[1:2] + 980.0 + 0.1)
    scalar = [given[0].sum(), given[1].sum()]
    base = torch.tensor([1000.0 + 1.1, 980.0 + 0.1, 990.0 + 0.2])
    added = torch.stack([scalar[0], scalar[1], scalar[0]])
    torch.testing.assert_close(result, x + (base + added).view(-1, 1, 1))


def test_weights_for_every_element_make_one_branch() -> None:
    network = Network()
    by_frame = torch.tensor([[[-1.0], [-2.0]], [[2.0], [3.0]]])  # [G, 2, 1]
    denoiser = two_branches(network, mixes=[by_frame] * 4)
    lines = [(1, 0, 0), (1, 2, 0)]
    x = latents(2)
    branches = [expected(x, [(step, row, g) for step, row, _ in lines]) for g in (0, 1)]
    torch.testing.assert_close(
        denoiser(x, lines), by_frame[0] * branches[0] + by_frame[1] * branches[1]
    )
    assert network.batches == [4]


def test_the_model_sees_its_own_dtype() -> None:
    network = Network()
    made = arguments(network, dtype=torch.bfloat16)
    assert prediction(made.call(latents(2), [0, 1], 7)).dtype == torch.bfloat16
    assert network.seen[0]["x"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("times", "lines", "result"),
    [
        ([7, 7], [0, 3], 7),
        ([7, 8], [0, 3], torch.tensor([7, 8])),
        ([torch.tensor(7.0), torch.tensor(8.0)], [0, 3], torch.tensor([7.0, 8.0])),
        ([torch.arange(4), torch.arange(4) + 10], [0, 3], torch.tensor([0, 13])),
        (
            [torch.ones(4, 2), 2 * torch.ones(4, 2)],
            [0, 3],
            torch.tensor([[1.0, 1.0], [2.0, 2.0]]),
        ),
    ],
)
def test_times_of_lines(times: list[Any], lines: list[int], result: Any) -> None:
    joined = join_times(times, lines, batch=4)
    if isinstance(result, Tensor):
        assert torch.equal(joined, result)
        assert joined.dtype == result.dtype
    else:
        assert joined == result


def test_a_model_that_returns_no_tensor() -> None:
    with pytest.raises(ValueError, match="the model returned dict without a tensor in it"):
        prediction({"sample": None})


def test_times_are_where_the_latents_are() -> None:
    """A scheduler may keep its timesteps on the host."""
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    arguments = RecordedArguments(
        model=model, args=(None, None), kwargs={}, sample=0, time=1, batch=1, dtype=torch.float32
    )
    steps = [
        RecordedStep(
            calls=[RecordedCall(arguments=arguments, time=torch.tensor(t))], places={0: (0, 0)}
        )
        for t in (9, 5)
    ]
    denoiser = RecordedDenoiser(rows=1, shape=torch.Size([4]), steps=steps)
    denoiser(torch.empty(2, 4, device="meta"), [(0, 0, 0), (1, 0, 0)])
    assert [t.device.type for t in seen] == ["meta"] and seen[0].shape == (2,)
