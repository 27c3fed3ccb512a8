"""Ranges for a profiler: their names and nesting, and nothing where nobody listens."""

import sys
import types
from collections.abc import Iterator

import pytest
import torch

from sidestep.runtime import ranges
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criterion import Course
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
    ranges._domain.cache_clear()
    yield package.get_domain("sidestep")
    ranges._domain.cache_clear()


def drive(steps: int) -> None:
    driver = Stepwise(Adaptive(mode="paper", threshold=1e9).criterion())
    driver.begin(Course(steps=steps))
    x = torch.zeros(2, 3)
    for _ in range(steps):
        driver.predict(lambda x: x, (x,), {})
        driver.observe(x, x + 1)


def test_steps_and_model_calls(domain: Domain) -> None:
    drive(5)
    computed = [line for k in range(4) for line in (f"+step/{k}", "+model", "-model", f"-step/{k}")]
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
    ranges._domain.cache_clear()
    assert ranges.start("model") is None
    drive(5)
    ranges._domain.cache_clear()
