"""Random sequences of calls of the C API with random arguments; run by itself under a sanitizer.

Arrays are as long as the headers ask for; everything else may be wrong, null addresses included.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import capi
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

MOST_ROWS, MOST_DIM, MOST_ENTRIES, STEPS = 3, 40, 6, 8
PLAN = Path(__file__).resolve().parents[2] / "examples/cpp/ddim-8.plan"
STRANGE = st.sampled_from((-1, 0, 1, 2, 3, 1 << 20, (1 << 31) - 1))
HUGE = st.sampled_from((-(1 << 63), (1 << 63) - 1, 1 << 40))


class Session:
    """An engine that may be missing, and the arrays that it was given."""

    def __init__(self, data: st.DataObject) -> None:
        """Tries to make the engine."""
        self.data, self.engine, self.plan = data, ctypes.c_void_p(), capi.load(PLAN)
        self.dim = self.number(MOST_DIM, st.integers(1, MOST_DIM))
        self.kept: list[Any] = []
        self.x = np.zeros((MOST_ENTRIES, MOST_DIM), np.float32)
        self.entries = (capi.Entry * MOST_ENTRIES)()
        self.tickets, self.ids = [(0, 0)], [0]
        made = capi.options(
            self.dim, (self.number(1), self.number(3), MOST_ENTRIES),
            capacity=self.number(MOST_ROWS, HUGE), queue=self.number(2),
            table_steps=self.number(20), num_registers=self.small(2), num_branches=self.small(2),
            dtype=self.small(0), device=self.small(0), skips=self.small(1),
        )  # fmt: skip
        size = ctypes.c_int64(-1)
        self.call("engine_memory", self.pointer(made), self.pointer(size))
        if self.dim <= MOST_DIM and made.capacity <= MOST_ROWS:
            self.call("engine_create", self.pointer(made), self.pointer(self.engine))

    def number(self, likely: int, other: st.SearchStrategy[int] = STRANGE) -> int:
        return self.data.draw(st.one_of(st.just(likely), st.just(likely), other))

    def small(self, likely: int) -> int:
        return self.number(likely, st.one_of(STRANGE, st.integers(0, 3)))

    def pointer(self, value: Any) -> Any:
        return None if self.data.draw(st.integers(0, 19)) == 19 else ctypes.byref(value)

    def address(self, array: np.ndarray) -> int | None:
        self.kept.append(array)
        return None if self.data.draw(st.integers(0, 19)) == 19 else capi.address(array)

    def call(self, name: str, *arguments: Any) -> int:
        """Of the status it is known that it is one, and that a failure has a sentence."""
        return capi.call(name, *arguments)

    def submit(self) -> None:
        request = capi.Request(
            plan=self.plan if self.data.draw(st.booleans()) else self.number(0, st.just(0)) or None,
            latents=self.address(np.ones((MOST_ROWS, MOST_DIM), np.float32)),
            guidance=self.address(np.ones((STEPS, 3), np.float32)),
            guidance_steps=self.number(1, st.one_of(STRANGE, st.just(STEPS))),
            rows=self.number(2), dim=self.number(self.dim), group=self.number(0, HUGE),
            branches=self.small(1), max_skip=self.small(0),
            skip_threshold=self.data.draw(st.floats(width=32)),
        )  # fmt: skip
        id = ctypes.c_int64(-1)
        if self.call("engine_submit", self.engine, self.pointer(request), self.pointer(id)) == 0:
            self.ids.append(id.value)

    def next(self) -> None:
        room = self.number(MOST_ENTRIES)
        entries = self.entries if self.data.draw(st.integers(0, 9)) else None
        made = capi.Call(self.address(self.x), None, entries, room)
        status = self.call("engine_next", self.engine, self.pointer(made), None)
        assert 0 <= made.num_entries <= made.size <= MOST_ENTRIES
        if status == capi.OK and made.size:
            self.tickets.append((made.ticket, made.size))

    def complete(self) -> None:
        ticket, size = self.data.draw(st.sampled_from(self.tickets))
        outputs = self.address(np.ones((MOST_ENTRIES, MOST_DIM), np.float32))
        ticket, size = self.number(ticket, HUGE), self.number(size)
        self.call("engine_complete", self.engine, ticket, outputs, size, None)

    def fail(self) -> None:
        ticket, _ = self.data.draw(st.sampled_from(self.tickets))
        reason = self.data.draw(st.one_of(st.none(), st.binary(max_size=300)))
        self.call("engine_fail", self.engine, self.number(ticket, HUGE), reason)

    def cancel(self) -> None:
        id = self.number(self.data.draw(st.sampled_from(self.ids)), HUGE)
        self.call("engine_cancel", self.engine, id, self.pointer(ctypes.c_int32()))

    def result(self) -> None:
        result, counts = capi.Result(), capi.Counts()
        any_ = self.pointer(ctypes.c_int32())
        self.call("engine_result", self.engine, self.pointer(result), any_)
        if self.call("engine_count", self.engine, self.pointer(counts)) == capi.OK:
            ended = counts.done + counts.cancelled + counts.failed
            assert counts.submitted in (0, ended + counts.waiting + counts.running)

    def close(self) -> None:
        """Ends what was made; null is allowed."""
        capi.library().sidestep_engine_destroy(self.engine)
        capi.library().sidestep_plan_destroy(self.plan)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.data())
def sequences(data: st.DataObject) -> None:
    """Any calls in any order."""
    session = Session(data)
    names = ("submit", "next", "complete", "fail", "cancel", "result")
    for name in data.draw(st.lists(st.sampled_from(names), max_size=25)):
        getattr(session, name)()
    session.close()


OTHERS = (
    "solver_step", "difference_gram", "parareal_correct", "scheduler_create", "scheduler_submit",
    "scheduler_extend", "scheduler_admit", "scheduler_next", "scheduler_complete",
    "scheduler_fail", "scheduler_skipping", "scheduler_drop", "scheduler_drop_row",
    "scheduler_count", "parareal_create", "parareal_begin", "parareal_limit", "parareal_chain",
    "parareal_finished", "parareal_cost", "parareal_simulate", "cuda_solver_step",
)  # fmt: skip


def null_everywhere() -> None:
    """Every other function with nothing but zeros: null handles and null addresses."""
    for name in OTHERS:
        function = getattr(capi.library(), f"sidestep_{name}")
        status = function(*[ctypes.c_void_p(0)] * 6)
        assert status in (capi.INVALID, capi.UNAVAILABLE), (name, status)
        assert "null" in capi.error() or "CUDA" in capi.error(), (name, capi.error())
    build_info = capi.library().sidestep_build_info
    build_info.restype = ctypes.c_char_p
    assert build_info(None) is None


if __name__ == "__main__":
    null_everywhere()
    sequences()
    print(f"{sys.argv[0]}: no complaint")
