"""A flight through toy blocks: who runs what, with which arguments, and where everybody lands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sidestep.runtime.exits.flight import Flight
from sidestep.runtime.exits.layouts import Blocks, Layout

SINGLE = Blocks("blocks", ("hidden_states", "time", "table"), ("hidden_states",), ("time",))
JOINT = Blocks(
    "blocks",
    ("hidden_states", "text", "time"),
    ("text", "hidden_states"),
    ("time",),
)
DEPTH = 4


class AtDepth:
    """Row `b` leaves once it has passed `depths[b]` blocks; the head is then told -h."""

    def __init__(self, depths: Sequence[int]) -> None:
        self.depths = depths
        self.asked: list[tuple[int, list[int]]] = []

    def leave(self, index: int, hidden: Tensor, places: Sequence[int]) -> list[bool]:
        self.asked.append((index, list(places)))
        assert hidden[:, 0, 0].tolist() == [float(100 * p + index + 1) for p in places]
        return [self.depths[place] == index + 1 for place in places]

    def translate(self, index: int, hidden: Tensor) -> Tensor:
        return -hidden

    def land(self, hidden: Tensor) -> None:
        self.landed = hidden


def start(batch: int) -> Tensor:  # [batch, 2, 3]
    return (100.0 * torch.arange(batch))[:, None, None].expand(batch, 2, 3).clone()


def fly(depths: Sequence[int], ran: list[list[int]]) -> tuple[Tensor, Flight, AtDepth]:
    """Every block adds 1 to a row, and sees that the row's own time came with it."""
    gate = AtDepth(depths)
    flight = Flight(len(depths), DEPTH, gate)
    time, table = torch.arange(len(depths)), torch.zeros(len(depths), 7)
    hidden = start(len(depths))

    def block(hidden_states: Tensor, time: Tensor, table: Tensor) -> Tensor:
        ran[-1] += time.tolist()
        assert torch.equal(hidden_states[:, 0, 0] // 100, time.float()) and table.shape == (
            len(depths),
            7,
        )
        return hidden_states + 1

    for index in range(DEPTH):
        ran.append([])
        hidden = flight.through(index, SINGLE, block, (hidden,), {"time": time, "table": table})
    return hidden, flight, gate


def test_rows_leave_one_after_another_and_land_in_their_places() -> None:
    ran: list[list[int]] = []
    hidden, flight, gate = fly([4, 1, 3, 2, 1], ran)
    assert ran == [[0, 1, 2, 3, 4], [0, 2, 3], [0, 2], [0]]
    assert flight.depths == [4, 1, 3, 2, 1]
    assert hidden[:, 1, 2].tolist() == [4.0, -101.0, -203.0, -302.0, -401.0]
    assert gate.asked == [(0, [0, 1, 2, 3, 4]), (1, [0, 2, 3]), (2, [0, 2])]


def test_all_leave_at_last() -> None:
    ran: list[list[int]] = []
    hidden, flight, gate = fly([2, 1, 2], ran)
    assert not hasattr(gate, "landed")
    assert ran == [[0, 1, 2], [0, 2], [], []] and flight.depths == [2, 1, 2]
    assert hidden[:, 0, 0].tolist() == [-2.0, -101.0, -202.0]


def test_nobody_leaves() -> None:
    ran: list[list[int]] = []
    hidden, _, gate = fly([4, 4], ran)
    assert ran == [[0, 1]] * 4 and torch.equal(hidden, start(2) + 4)
    assert gate.landed is hidden


def test_a_batch_that_leaves_at_once_is_not_copied() -> None:
    gate = AtDepth([1, 1])
    gate.translate = lambda index, hidden: hidden  # type: ignore[method-assign]
    flight = Flight(2, DEPTH, gate)
    first = flight.through(0, SINGLE, lambda h, time: h + 1, (start(2), torch.arange(2)), {})
    hidden = first
    for index in range(1, DEPTH):
        hidden = flight.through(index, SINGLE, fail, (hidden, torch.arange(2)), {})
    assert hidden is first


def fail(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("a block runs without a row")


def test_two_streams_shrink_together_and_one_line_stays_one() -> None:
    flight = Flight(3, 2, AtDepth([1, 2, 2]))
    seen: list[tuple[int, ...]] = []

    def block(hidden_states: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor | None, Tensor]:
        seen.append((len(hidden_states), len(text), len(time)))
        last = len(seen) == 2  # SD3's last block gives no text
        return None if last else text + hidden_states[:, :1], hidden_states + 1

    call: Callable[..., Any] = block
    time = torch.zeros(1)
    text, hidden = flight.through(0, JOINT, call, (), given(start(3), torch.zeros(3, 5, 3), time))
    assert text.shape == (2, 5, 3) and text[:, 0, 0].tolist() == [100.0, 200.0]
    text, hidden = flight.through(1, JOINT, call, (), given(hidden, text, time))
    assert text is None and hidden[:, 0, 0].tolist() == [-1.0, 102.0, 202.0]
    assert seen == [(3, 3, 1), (2, 2, 1)]


def given(hidden: Tensor, text: Tensor, time: Tensor) -> dict[str, Tensor]:
    return {"hidden_states": hidden, "text": text, "time": time}


def test_gradients_flow_through_a_flight() -> None:
    flight = Flight(2, DEPTH, AtDepth([1, 4]))
    first = start(2).requires_grad_()
    hidden: Tensor = first

    def block(hidden_states: Tensor, time: Tensor) -> Tensor:
        return hidden_states + 1

    for index in range(DEPTH):
        hidden = flight.through(index, SINGLE, block, (hidden, torch.arange(2)), {})
    hidden.sum().backward()
    assert first.grad is not None and first.grad[:, 0, 0].tolist() == [-1.0, 1.0]


def test_a_layout_says_when_rows_stay_together() -> None:
    layout = Layout((SINGLE,), between=("extra",))
    assert layout.keeps_together({"extra": {"scale": 1}})
    assert not layout.keeps_together({"extra": None, "other": 1})
    assert not layout.keeps_together({"extra": {}})
