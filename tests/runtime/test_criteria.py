"""Criteria: each formula against numpy, then the gate that they share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criteria.gate import Gate, Gated
from sidestep.runtime.methods.criterion import Course, Criterion, Decision, Observation
from sidestep.runtime.methods.reuse import reuse_weights, straightness

FORMULAS = ["third-difference", "elementwise", "windowed", "entropy", "features"]
MODES = [*FORMULAS, "learned"]
ROWS, STEPS, SHAPE = 5, 24, (3, 4, 5)


@dataclass
class Trajectory:
    """Latents ``[STEPS + 1, rows, ...]`` and outputs ``[STEPS, rows, ...]``, fp32."""

    latents: torch.Tensor
    outputs: torch.Tensor

    def seen(self, k: int, computed: list[bool], rows: slice = slice(None)) -> Observation:
        return Observation(
            step=k, x=self.latents[k, rows], x_next=self.latents[k + 1, rows],
            output=self.outputs[k, rows], computed=computed[rows],
        )  # fmt: skip


@pytest.fixture
def trajectory() -> Trajectory:
    """Smooth paths with a row of its own roughness each."""
    generator = torch.Generator().manual_seed(7)
    time = torch.linspace(0, 3, STEPS + 1)[:, None]
    rough = torch.logspace(-4, -1, ROWS)[:, None]

    def paths() -> torch.Tensor:
        size = math.prod(SHAPE)
        phase, speed = (torch.rand(2, ROWS, size, generator=generator) * 4).unbind()
        wobble = torch.randn(STEPS + 1, ROWS, size, generator=generator) * rough
        smooth = torch.sin(phase + speed * time[:, None]) + time[:, None] ** 2
        return (smooth + wobble).unflatten(2, SHAPE)

    return Trajectory(paths(), paths()[:STEPS])


def mixed_calls() -> np.ndarray:
    """Which steps were computed, [STEPS, ROWS]: everything at first, then runs of every length."""
    computed = np.random.default_rng(3).random((STEPS, ROWS)) < 0.5
    computed[:4] = True
    return computed


def transcription(mode: str, path: Trajectory, computed: np.ndarray, row: int) -> np.ndarray:
    """The number after every step of one row, [STEPS], float64; NaN where it cannot be formed."""
    x = path.latents[:, row].double().flatten(1).numpy()
    u = path.outputs[:, row].double().flatten(1).numpy()
    delta = np.abs(x[1:] - x[:-1]).mean(1)
    values = np.full(STEPS, np.nan)
    relative = np.full(STEPS, np.nan)
    for k in range(2, STEPS):
        relative[k] = abs((delta[k] + delta[k - 2]) / 2 - delta[k - 1]) / delta[k - 1]
    for k in range(STEPS):
        if mode == "third-difference":
            values[k] = relative[k]
        elif mode == "elementwise" and k >= 2:
            third = x[k + 1] - 3 * x[k] + 3 * x[k - 1] - x[k - 2]
            values[k] = np.abs(third).mean() / 2 / delta[k - 1]
        elif mode == "windowed" and k >= 2:
            window = relative[2 : k + 1][::-1][:4]
            values[k] = np.average(window, weights=[1, 1 / 2, 1 / 4, 1 / 8][: len(window)])
        elif mode == "entropy" and k >= 1:
            H = [0.5 * np.log(2 * np.pi * np.e * x[i].var()) for i in (k - 1, k, k + 1)]
            values[k] = abs(H[2] - 2 * H[1] + H[0])
        elif mode == "features":
            fresh = [i for i in range(k + 1) if computed[i, row]][-2:]
            if len(fresh) == 2:
                j, i = fresh
                values[k] = np.abs(u[i] - u[j]).mean() / np.abs(u[i]).mean() / (i - j)
    return values


def measured(mode: str, path: Trajectory, computed: np.ndarray, rows: slice) -> np.ndarray:
    """What the criterion itself measures, [STEPS, rows]; NaN where it has no number."""
    criterion = Adaptive(mode=mode).criterion()
    assert isinstance(criterion, Gated)
    chosen = range(ROWS)[rows]
    criterion.start(Course(rows=len(chosen), steps=STEPS))
    numbers = []
    for k in range(STEPS):
        value = criterion.number(path.seen(k, computed[k].tolist(), rows))
        assert value is None or (value.dtype == torch.float32 and value.shape == (len(chosen),))
        numbers.append(torch.full((len(chosen),), math.nan) if value is None else value)
    return torch.stack(numbers).numpy()


@pytest.mark.parametrize("mode", FORMULAS)
def test_formula_equals_its_transcription(mode: str, trajectory: Trajectory) -> None:
    computed = mixed_calls()
    ours = measured(mode, trajectory, computed, slice(None))
    for row in range(ROWS):
        expected = transcription(mode, trajectory, computed, row)
        assert np.array_equal(np.isnan(ours[:, row]), np.isnan(expected))
        assert np.isfinite(expected).sum() >= STEPS - 2
        # Second differences of O(1) entropies, or of step sizes: fp32 leaves 1e-7 of the terms.
        np.testing.assert_allclose(ours[:, row], expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_rows_do_not_see_each_other(mode: str, trajectory: Trajectory) -> None:
    computed = mixed_calls()
    together = measured(mode, trajectory, computed, slice(None))
    for row in range(ROWS):
        alone = measured(mode, trajectory, computed, slice(row, row + 1))
        np.testing.assert_array_equal(alone[:, 0], together[:, row])


@pytest.mark.parametrize("mode", MODES)
def test_what_the_host_overwrites_is_not_read_later(mode: str, trajectory: Trajectory) -> None:
    """Latents and outputs may be buffers that the next step writes into."""
    computed = mixed_calls()
    expected = measured(mode, trajectory, computed, slice(None))
    criterion = Adaptive(mode=mode).criterion()
    assert isinstance(criterion, Gated)
    criterion.start(Course(rows=ROWS, steps=STEPS))
    for k in range(STEPS):
        seen = trajectory.seen(k, computed[k].tolist())
        buffers = [seen.x.clone(), seen.x_next.clone(), trajectory.outputs[k].clone()]
        value = criterion.number(
            Observation(
                step=k, x=buffers[0], x_next=buffers[1], output=buffers[2], computed=seen.computed
            )
        )
        if value is not None:
            np.testing.assert_array_equal(value.numpy(), expected[k])
        for buffer in buffers:
            buffer.fill_(math.nan)


def drive(criterion: Criterion, path: Trajectory, course: Course) -> list[Decision]:
    """Follows the decisions along a fixed trajectory."""
    criterion.start(course)
    computed = [True] * course.rows
    decisions = []
    for k in range(STEPS):
        decisions.append(criterion.observe(path.seen(k, computed, slice(course.rows))))
        computed = decisions[-1].compute
    return decisions


@pytest.mark.parametrize("mode", MODES)
def test_decisions_follow_the_number(mode: str, trajectory: Trajectory) -> None:
    values = measured(mode, trajectory, np.ones((STEPS, ROWS), bool), slice(None))
    threshold = float(np.nanmedian(values[3:]))
    settings = Adaptive(
        mode=mode, threshold=threshold, debt=False, max_skip=STEPS, warm_up=4, gradual=False
    )
    decisions = drive(settings.criterion(), trajectory, Course(rows=ROWS))
    assert all(d.reasons == ["warm-up"] * ROWS and d.value is None for d in decisions[:3])
    for decision in decisions[3:]:
        assert decision.value is not None
        assert decision.compute == [not v <= threshold for v in decision.value.tolist()]
    chosen = [reason for d in decisions[3:] for reason in d.reasons]
    assert set(chosen) == {"criterion", "skipped"}


class Given(Gated):
    """A criterion whose numbers are the trajectory's latents: the gate by itself."""

    DEFAULTS = Gate(threshold=1.0)

    def begin(self) -> None:
        """Keeps nothing."""

    def measure(self, seen: Observation) -> torch.Tensor | None:
        """The latents."""
        return seen.x


def words(values: list[float], course: Course, **settings: object) -> list[str]:
    """Reasons of one row whose criterion has the given values."""
    criterion = Given(Gate(**{"threshold": 1.0, **settings}))  # type: ignore[arg-type]
    criterion.start(course)
    reasons, computed = [], [True]
    for k, value in enumerate(values):
        x = torch.tensor([value])
        seen = Observation(step=k, x=x, x_next=x, output=None, computed=computed)
        decision = criterion.observe(seen)
        reasons += decision.reasons
        computed = decision.compute
    return reasons


def test_the_cap_is_exact() -> None:
    for cap in (1, 2, 3, 6, 8):
        after = words([0.0] * 40, Course(rows=1), warm_up=1, max_skip=cap)
        assert after == ((["skipped"] * cap + ["cap"]) * 40)[:40]


def test_first_and_last_steps_are_computed() -> None:
    course = Course(rows=1, steps=10)
    reasons = words([0.0] * 10, course, warm_up=3, protect_last=2, max_skip=9)
    assert reasons == ["warm-up"] * 2 + ["skipped"] * 5 + ["last"] * 3
    assert words([0.0] * 3, Course(rows=1), warm_up=1, protect_last=2) == ["skipped"] * 3


def test_a_gradual_run_is_one_step_longer_at_most_than_the_run_before() -> None:
    after = words([0.0] * 22, Course(rows=1), warm_up=2, max_skip=4, gradual=True)
    runs = "".join("." if word == "skipped" else "#" for word in after)
    assert runs == "#.#..#...#....#....#.."
    values = [0.0] * 4 + [2.0] + [0.0] * 4
    cut = words(values, Course(rows=1), warm_up=2, gradual=True)  # after one skip instead of two
    assert cut[3:] == ["skipped", "criterion", "skipped", "skipped", "cap", "skipped"]
    many = words([0.0] * 40, Course(rows=1, steps=350), warm_up=2, max_skip=9, gradual=True)
    runs = "".join("." if word == "skipped" else "#" for word in many)
    assert runs == "#...#......#.........#.........#........"  # three more in 350 steps


def test_debt_adds_up_over_a_run_and_is_paid_by_computing() -> None:
    reasons = words([0.4] * 9, Course(rows=1), warm_up=1, max_skip=9)
    assert reasons == ["skipped", "skipped", "criterion"] * 3
    assert words([0.4] * 9, Course(rows=1), warm_up=1, max_skip=9, debt=False) == ["skipped"] * 9
    assert words([1.0, 0.0, 0.0, 2**-20], Course(rows=1), warm_up=1)[-1] == "criterion"


def test_equality_skips_and_not_a_number_computes() -> None:
    above = float(np.nextafter(np.float32(1), np.float32(2)))
    reasons = words([1.0, above, math.nan, math.inf, 0.0], Course(rows=1), warm_up=1, debt=False)
    assert reasons == ["skipped", "criterion", "criterion", "criterion", "skipped"]
    assert words([0.1, math.nan, 0.1], Course(rows=1), warm_up=1)[1:] == ["criterion", "skipped"]


def test_a_step_that_the_driver_computed_anyway_counts_as_computed() -> None:
    criterion = Given(Gate(threshold=1.0, warm_up=1, max_skip=2))
    criterion.start(Course(rows=1))
    for step in range(8):
        x = torch.tensor([0.9])
        seen = Observation(step=step, x=x, x_next=x, output=None, computed=[True])
        decision = criterion.observe(seen)
        assert decision.reasons == ["skipped"]
        assert decision.value is not None and decision.value.tolist() == [np.float32(0.9)]
        assert decision.weights == [reuse_weights("linear", [step, step - 1][: step + 1], step + 1)]


@pytest.mark.parametrize("mode", FORMULAS)
@pytest.mark.parametrize("reuse, history", [("linear", 2), ("quadratic", 3), ("interleave", 2)])
def test_weights_are_of_each_rows_own_computed_steps(
    mode: str, reuse: str, history: int, trajectory: Trajectory
) -> None:
    values = measured(mode, trajectory, np.ones((STEPS, ROWS), bool), slice(None))
    settings = Adaptive(mode=mode, threshold=float(np.nanmedian(values[3:])), reuse=reuse)
    criterion = settings.criterion()
    assert criterion.history == history
    log_snr = np.cumsum(np.random.default_rng(1).random(STEPS) + 0.1).tolist()
    decisions = drive(criterion, trajectory, Course(rows=ROWS, steps=STEPS, log_snr=log_snr))
    called = np.array([[True] * ROWS] + [d.compute for d in decisions])[:STEPS]
    for k, decision in enumerate(decisions[:-1]):
        for row in range(ROWS):
            computed = [i for i in range(k + 1) if called[i, row]][::-1]
            weights = reuse_weights(reuse, computed, k + 1, log_snr)
            given = () if decision.weights is None else decision.weights[row]
            assert given == (() if decision.compute[row] else weights)
    assert 0.1 < 1 - called.mean() < 0.9


def damped(path: Trajectory, computed: list[int], wanted: int, row: int, course: Course) -> float:
    """The damping of one row's slope at the step wanted, float64; computed: newest first."""
    assert course.log_snr is not None
    u, at = path.outputs[:, row].double().flatten(1).numpy(), course.log_snr
    share = 0.5
    if len(computed) > 2:
        b, i, j = computed[:3]
        line = (u[i] - u[j]) * (at[b] - at[i]) / (at[i] - at[j])
        share = min(1, max(0, (u[b] - u[i]) @ line / (line @ line)))
    return max(share, straightness(computed, wanted, course))


@pytest.mark.parametrize("multistep", [False, True])
@pytest.mark.parametrize("mode", FORMULAS)
def test_every_mode_can_damp_its_line(mode: str, multistep: bool, trajectory: Trajectory) -> None:
    values = measured(mode, trajectory, np.ones((STEPS, ROWS), bool), slice(None))
    settings = Adaptive(mode=mode, threshold=float(np.nanmedian(values[3:])), reuse="damped")
    log_snr = np.cumsum(np.random.default_rng(1).random(STEPS) / 4 + 0.1).tolist()
    course = Course(rows=ROWS, steps=STEPS, log_snr=log_snr, multistep=multistep)
    decisions = drive(settings.criterion(), trajectory, course)
    called = np.array([[True] * ROWS] + [d.compute for d in decisions])[:STEPS]
    shares = []
    for k, decision in enumerate(decisions[:-1]):
        for row in np.flatnonzero(~called[k + 1]):
            computed = [i for i in range(k + 1) if called[i, row]][::-1]
            share = damped(trajectory, computed, k + 1, row, course)
            expected = reuse_weights("linear", computed, k + 1, log_snr, share)
            assert decision.weights is not None
            assert decision.weights[row] == pytest.approx(expected, abs=1e-4)
            shares.append(share)
    assert len(shares) > 20 and min(shares) < 0.9 < max(shares)


@pytest.mark.parametrize("mode", FORMULAS)
def test_hold_needs_no_weights_and_one_output(mode: str, trajectory: Trajectory) -> None:
    criterion = Adaptive(mode=mode, reuse="hold", threshold=1e9).criterion()
    decisions = drive(criterion, trajectory, Course(rows=ROWS))
    assert criterion.history == 1
    assert all(decision.weights is None for decision in decisions)
    assert decisions[3].reasons == ["skipped"] * ROWS


@pytest.mark.parametrize("mode", MODES)
def test_starting_again_forgets(mode: str, trajectory: Trajectory) -> None:
    criterion = Adaptive(mode=mode, threshold=1e9).criterion()
    first = drive(criterion, trajectory, Course(rows=ROWS, steps=STEPS))
    drive(criterion, trajectory, Course(rows=2))
    again = drive(criterion, trajectory, Course(rows=ROWS, steps=STEPS))
    assert [d.reasons for d in first] == [d.reasons for d in again]
    assert all(
        torch.equal(a.value, b.value)
        for a, b in zip(first, again, strict=True)
        if a.value is not None and b.value is not None
    )


@pytest.mark.parametrize(
    "settings",
    [{"mode": "features"}, {"mode": "learned"}, {"mode": "elementwise", "reuse": "damped"}],
)
def test_a_hidden_output_computes_and_says_so(settings: dict, trajectory: Trajectory) -> None:
    criterion = Adaptive(**settings).criterion()
    criterion.start(Course(rows=ROWS))
    for k in range(6):
        seen = trajectory.seen(k, [True] * ROWS)
        hidden = Observation(
            step=k, x=seen.x, x_next=seen.x_next, output=None, computed=seen.computed
        )
        assert criterion.observe(hidden).reasons == ["output hidden"] * ROWS


@pytest.mark.parametrize(
    "mode, reuse",
    [*((mode, None) for mode in ("paper", "error-control", *MODES)), ("elementwise", "damped")],
)
def test_at_most_one_read_of_the_device_a_step(
    mode: str, reuse: str | None, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def count(name: str) -> None:
        plain = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
            if tensor.numel() and not isinstance(tensor, OnHost):
                reads.append(name)
            result = plain(tensor, *args, **kwargs)
            return result.as_subclass(OnHost) if name == "cpu" else result

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        count(name)
    criterion = Adaptive(mode=mode, threshold=1e9, reuse=reuse).criterion()
    criterion.start(Course(rows=ROWS, steps=STEPS))
    for k in range(STEPS):
        reads.clear()
        decision = criterion.observe(trajectory.seen(k, [k < 4 or k % 3 == 0] * ROWS))
        assert len(reads) <= (decision.value is not None), reads


class OnHost(torch.Tensor):
    """A tensor that has been read already."""
