"""Ranges for a profiler: their names and nesting, and nothing where nobody listens."""

import sys
import types
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from engine_cases import plan_of

from sidestep.runtime import ranges
from sidestep.runtime.engine import Engine
from sidestep.runtime.engine_loop import EngineLoop
from sidestep.runtime.engine_request import Request
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criterion import Course
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.stepwise import Stepwise


class Domain:
    """As in the package `nvtx`, writing down what it is told."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def get_event_attributes(self, message: str) -> str:
        return message

    def start_range(self, attributes: str) -> str:
        self.log.append(f"+{attributes}")
        return attributes

    def end_range(self, started: str) -> None:
        self.log.append(f"-{started}")


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Domain]:
    made: dict[str, Domain] = {}
    package = types.ModuleType("nvtx")
    package.Domain = Domain  # type: ignore[attr-defined]
    package.get_domain = lambda name: made.setdefault(name, Domain())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", package)
    ranges._nvtx.cache_clear()
    yield package.get_domain("sidestep")
    ranges._nvtx.cache_clear()


def drive(steps: int) -> None:
    driver = Stepwise(Adaptive(mode="paper", threshold=1e9).criterion())
    driver.begin(Course(steps=steps))
    x = torch.zeros(2, 3)
    for _ in range(steps):
        driver.predict(lambda x: x, (x,), {})
        driver.observe(x, x + 1)


def test_steps_and_model_calls(domain: Domain) -> None:
    drive(5)
    decided = ["+decide", "-decide"]
    computed = [
        line
        for k in range(4)
        for line in (f"+step/{k}", "+model", "-model", f"-step/{k}", *decided)
    ]
    assert domain.log == [*computed, "+step/4", "-step/4"]


def test_an_exception_ends_its_ranges(domain: Domain) -> None:
    driver = Stepwise(Adaptive(mode="paper").criterion())
    driver.begin()
    with pytest.raises(ZeroDivisionError):
        driver.predict(lambda x: 1 / 0, (torch.zeros(1, 1),), {})
    driver.release()
    assert domain.log == ["+step/0", "+model", "-model", "-step/0"]


@pytest.mark.parametrize("package", [None, types.ModuleType("nvtx")], ids=["absent", "idle"])
def test_nothing_happens_without_a_listener(
    monkeypatch: pytest.MonkeyPatch, package: types.ModuleType | None
) -> None:
    if package is not None:
        package.Domain = Domain  # type: ignore[attr-defined]
        package.get_domain = lambda name: object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", package)
    ranges._nvtx.cache_clear()
    assert ranges.start("model") is None
    drive(5)
    ranges._nvtx.cache_clear()


def sample(method: Adaptive | SRDS | None, steps: int = 8) -> Engine:
    engine = Engine((3,), capacity=16)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    engine.submit(Request(plan=plan_of("ddim", steps), x=x, method=method))
    EngineLoop(engine, lambda x, t, conditioning: 0.1 * x).run()
    (result,) = engine.results()
    assert result.status == "done", result.error
    return engine


def counted(log: list[str]) -> Counter[str]:
    """How often each range begins; every one of them has to end."""
    begun = Counter(line[1:] for line in log if line[0] == "+")
    assert begun == Counter(line[1:] for line in log if line[0] == "-")
    return begun


def test_an_engine(domain: Domain) -> None:
    sample(Adaptive(mode="paper", threshold=1e-9))
    assert counted(domain.log) == {"model": 8, "step": 8, "decide": 7}
    assert domain.log[:4] == ["+model", "-model", "+step", "-step"]


def test_the_blocks_of_srds(domain: Domain) -> None:
    sample(SRDS(blocks=4, tolerance=0.0))
    begun = counted(domain.log)
    assert begun["fine[0:2]"] == 2  # of two images: the first block has no second iterate
    assert {name for name in begun if name.startswith("fine")} >= {
        "fine[0:2]",
        "fine[2:4]",
        "fine[4:6]",
    }
    assert begun["model"] == begun["step"] >= 8
    assert 4 <= begun["correct"] <= begun["model"] and begun["decide"] == begun["model"]
    started = domain.log.index("+fine[0:2]")
    two_steps = ["+model", "-model", "+step", "-step"]
    end = domain.log.index("-fine[0:2]")
    steps = [line for line in domain.log[started:end] if line in two_steps]
    assert steps == two_steps * 2


def test_a_request_that_fails_ends_its_blocks(domain: Domain) -> None:
    engine = Engine((3,), capacity=16)
    request = Request(plan=plan_of("ddim", 8), x=torch.zeros(1, 3), method=SRDS(blocks=2))
    engine.submit(request)
    calls = iter([0, 0])
    EngineLoop(engine, lambda x, t, conditioning: x + next(calls)).run()
    assert [result.status for result in engine.results()] == ["failed"]
    assert counted(domain.log)["model"] == 3


def test_a_listener_takes_the_place_of_nvtx(domain: Domain) -> None:
    heard = Domain()
    heard.start, heard.end = heard.start_range, heard.end_range  # type: ignore[attr-defined]
    with ranges.heard_by(heard):  # type: ignore[arg-type]
        drive(2)
    assert heard.log[:2] == ["+step/0", "+model"] and domain.log == []
    drive(1)
    assert domain.log == ["+step/0", "+model", "-model", "-step/0"]


def test_what_a_range_costs_without_a_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call into this module for each end of a range, and none from there."""
    monkeypatch.setitem(sys.modules, "nvtx", None)
    ranges._nvtx.cache_clear()
    drive(1)  # takes the one look
    calls: Counter[str] = Counter()

    def count(frame: types.FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename == ranges.__file__:
            calls[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        drive(5)
    finally:
        sys.setprofile(None)
        ranges._nvtx.cache_clear()
    # 5 steps, 4 model calls and 4 decisions; generations that are let go of end a range as well
    assert calls == {"start": 5, "within": 4 + 4, "end": 5 + 2}
