"""The engine on rows that skip: the decisions and outputs are those of the stepwise driver."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from engine_cases import SHAPE, conditioning, latents, model, network, plan_of, requests, run, solo
from torch import Tensor

from sidestep.kernels import PreparedStep
from sidestep.runtime.engine import Batch, Engine, Request
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criteria import CRITERIA
from sidestep.runtime.methods.criterion import Course, Decision, Observation
from sidestep.runtime.plan_course import plan_course
from sidestep.runtime.stepwise import Stepwise
from sidestep.runtime.summary import Summary

PAPER = Adaptive(mode="paper", threshold=0.3)


@dataclass(frozen=True)
class Script:
    """A method that skips where it is told, with weights and an offset that it is told."""

    marks: str  # '#' computes, by step
    weights: tuple[float, ...] | None = None
    offset: float | None = None
    history: int = 1

    def criterion(self) -> _Script:
        return _Script(self)


class _Script:
    def __init__(self, told: Script) -> None:
        self.told, self.history = told, told.history
        self.seen: list[Observation] = []

    def start(self, course: Course) -> None:
        self.course = course

    def observe(self, seen: Observation) -> Decision:
        rows, told = self.course.rows, self.told
        self.seen.append(seen)
        compute = told.marks[seen.step + 1] == "#"
        offset = None if told.offset is None else torch.full_like(seen.x, told.offset)
        return Decision(
            compute=[compute] * rows,
            reasons=["criterion" if compute else "skipped"] * rows,
            value=seen.delta,
            weights=None if told.weights is None else [told.weights] * rows,
            offset=offset,
        )


def stepwise(request: Request) -> tuple[Tensor, Summary]:
    """The request by the stepwise driver, all rows in lockstep, with the same fused step."""
    plan, x = request.plan, request.x
    n, branches = len(x), len(request.guidance)
    registers = torch.zeros(n, plan.registers, x[0].numel())
    registers[:, 0] = x.reshape(n, -1)
    weights, stats = torch.tensor([request.guidance] * n), torch.zeros(n, 2)
    step = torch.zeros(n, dtype=torch.int64)
    take = PreparedStep(registers, weights, plan.table(), step, None, stats)
    driver = Stepwise(request.method.criterion())
    driver.begin(plan_course(plan))
    shift = request.conditioning["shift"]
    for k in range(len(plan)):
        before = registers[:, 0].view(x.shape).clone()
        scale = torch.tensor(plan.input_scales[k]).float()
        t = torch.full((branches * n,), float(plan.timesteps[k]))
        u = driver.predict(network, (torch.cat([before * scale] * branches), t, shift), {})
        drawn = None if request.noise is None else request.noise[k, plan.used_draw(k) or 0]
        take(u, drawn)
        after = registers[:, 0].view(x.shape).clone()
        combined = sum(w * u[g * n : (g + 1) * n] for g, w in enumerate(request.guidance))
        driver.observe(before, after, combined, stats[:, 0])
        step.add_(1)
    return registers[:, 0].view(x.shape), driver.summary()


def same(request: Request) -> None:
    result = solo(request)
    assert result.error is None
    x, expected = stepwise(request)
    assert torch.equal(result.x, x)
    for name in ("nfe", "skip_map", "steps"):
        assert getattr(result.summary, name) == getattr(expected, name), name
    assert result.summary.reasons == expected.reasons
    criteria = (torch.tensor(each.criterion) for each in (result.summary, expected))
    torch.testing.assert_close(*criteria, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++2m", "dpmsolver++3s", "sde-dpmsolver++2m"])
@pytest.mark.parametrize("guidance", [(1.0,), (-1.5, 2.5), (0.2, 0.3, 0.5)])
def test_the_paper_mode_decides_as_stepwise(solver: str, guidance: tuple[float, ...]) -> None:
    plan, n = plan_of(solver, 14), 3
    noise = latents(9, 14 * n * max(plan.noise_columns, 1)).view(14, -1, n, *SHAPE)
    request = Request(
        plan,
        latents(2, n),
        conditioning(2, n, len(guidance)),
        guidance=guidance,
        method=PAPER,
        noise=noise if plan.stochastic else None,
    )
    alone = Engine(SHAPE, capacity=n, branches=3)
    alone.submit(request)
    (result,) = run(alone).values()
    x, expected = stepwise(request)
    assert torch.equal(result.x, x)
    assert result.summary.skip_map == expected.skip_map
    assert result.summary.reasons == expected.reasons
    assert 4 < min(expected.nfe) <= max(expected.nfe) < 14
    assert result.ticks == max(expected.nfe)


@pytest.mark.parametrize(
    "method",
    [
        Script("##.#..#...##"),
        Script("###..#.#...#", weights=(2.0, -1.0), history=2),
        Script("###..#.#....", weights=(1.5, -0.75, 0.25), history=3),
        Script("##.#..#...#.", offset=0.125),
        Script("####..#....#", weights=(3.0, -3.0, 1.0), offset=-0.5, history=3),
        Script("#...........", weights=()),
        Script("#...#...####", weights=(2.0, -1.0), history=2),  # too little to skip with at first
        Script("##..##..####", weights=(1.0, 0.5, 0.5), history=2),  # always too little
        Adaptive(mode="paper", threshold=1e-6),
    ],
    ids=repr,
)
@pytest.mark.parametrize("branches", [1, 2])
def test_what_a_skip_goes_on_with(method: Script, branches: int) -> None:
    guidance = (1.0,) if branches == 1 else (-0.5, 1.5)
    plan = plan_of("dpmsolver++2m", 12)
    same(
        Request(plan, latents(1, 2), conditioning(1, 2, branches), guidance=guidance, method=method)
    )


@pytest.mark.parametrize("mode", sorted(CRITERIA))
def test_every_criterion_decides_as_stepwise(mode: str) -> None:
    plan = plan_of("dpmsolver++2m", 20)
    x, given = latents(3, 2, (4, 8, 8)), conditioning(3, 2, 2)
    request = Request(plan, x, given, guidance=(-1.5, 2.5), method=Adaptive(mode=mode))
    result = solo(request)
    expected, summary = stepwise(request)
    assert result.error is None and torch.equal(result.x, expected)
    assert result.summary.skip_map == summary.skip_map


def test_reuse_is_of_the_raw_branches_where_the_guidance_changes() -> None:
    plan, n = plan_of("ddim", 5), 2
    given = conditioning(6, n, 2)
    weights = [(1.0 - s, float(s)) for s in range(5)]
    request = Request(plan, latents(6, n), given, guidance=weights, method=Script("#...."))
    x_in = request.x * torch.tensor(plan.input_scales[0]).float()
    u = network(
        torch.cat([x_in, x_in]), torch.full((2 * n,), float(plan.timesteps[0])), given["shift"]
    )
    outputs = iter([w[0] * u[:n] + w[1] * u[n:] for w in weights])
    expected = plan.run(lambda x, t: next(outputs), request.x)
    torch.testing.assert_close(solo(request).x, expected, rtol=2e-5, atol=2e-5)


def test_skipping_rows_do_not_wait_for_the_model() -> None:
    plan = plan_of("ddim", 9)
    busy = Request(plan, latents(0, 1), conditioning(0, 1, 1))
    skips = Request(plan, latents(1, 1), conditioning(1, 1, 1), method=Script("##......#"))
    engine = Engine(SHAPE, capacity=2, buckets=(1, 2))
    engine.submit(busy)
    quick = engine.submit(skips)
    steps = []
    for batch in engine:
        steps.append(dict(zip(batch.requests[: batch.size], batch.steps, strict=False)))
        engine.complete(batch, model(batch))
    assert steps[:4] == [{0: 0, 1: 0}, {0: 1, 1: 1}, {0: 2, 1: 8}, {0: 3}]
    first, second = engine.results()
    assert (first.id, first.ticks, first.nfe) == (quick, 3, (3.0,))
    assert second.ticks == 9


def test_rows_of_one_request_drift_apart() -> None:
    request = Request(plan_of("ddim", 20), latents(4, 4), conditioning(4, 4, 1), method=PAPER)
    seen: list[tuple[int, int]] = []
    listening = replace(request, on_step=lambda k, x, rows: seen.extend((k, r) for r in rows))
    result = solo(listening)
    assert len(set(result.nfe)) > 1
    assert result.ticks == max(result.nfe)
    assert sorted(seen) == [(k, row) for k in range(20) for row in range(4)]
    assert [k for k, _ in seen] != sorted(k for k, _ in seen)
    for row in range(4):
        mine = replace(
            request,
            x=request.x[row : row + 1],
            conditioning={"shift": request.conditioning["shift"][row : row + 1]},
        )
        alone = solo(mine)
        assert torch.equal(alone.x[0], result.x[row])
        assert alone.ticks == alone.nfe[0] == result.nfe[row]
        assert alone.summary.reasons[0] == result.summary.reasons[row]


@pytest.mark.parametrize("seed", range(3))
def test_methods_share_calls_and_equal_running_alone(seed: int) -> None:
    methods = (None, PAPER, Script("##.#" + "." * 20, weights=(2.0, -1.0), history=2))
    made = requests(12, methods=methods)
    engine = Engine(SHAPE, capacity=7, buckets=(1, 2, 3, 5, 9))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
    ids = {engine.submit(made[i]): made[i] for i in order}
    flying: list[tuple[Batch, Tensor]] = []
    results = {}
    while engine.counts()["running"] or engine.counts()["waiting"]:
        if len(flying) < 3 and (batch := engine.next()) is not None:
            flying.append((batch, model(batch)))
        else:
            engine.complete(*flying.pop((seed - 1) % len(flying)))
        results |= {result.id: result for result in engine.results()}
    for id, request in ids.items():
        alone = solo(request)
        assert results[id].error is None
        assert torch.equal(results[id].x, alone.x)
        assert results[id].summary.skip_map == alone.summary.skip_map
        assert results[id].summary.reasons == alone.summary.reasons


def test_a_criterion_sees_what_happened() -> None:
    plan = plan_of("dpmsolver++2m", 5)
    watched: list[_Script] = []

    class Watched(Script):
        def criterion(self) -> _Script:
            watched.append(super().criterion())
            return watched[-1]

    request = Request(
        plan, latents(7, 1), conditioning(7, 1, 2), guidance=(-1.0, 2.0), method=Watched("##.##")
    )
    states: list[Tensor] = [request.x]
    solo(replace(request, on_step=lambda k, x, rows: states.append(x)))
    (criterion,) = watched
    assert criterion.course == plan_course(plan, rows=1)
    assert [seen.step for seen in criterion.seen] == [0, 1, 2, 3]
    assert [list(seen.computed) for seen in criterion.seen] == [[True], [True], [False], [True]]
    for k, seen in enumerate(criterion.seen):
        assert torch.equal(seen.x, states[k]) and torch.equal(seen.x_next, states[k + 1])
        expected = (seen.x_next - seen.x).abs().mean().item()
        assert seen.delta.item() == pytest.approx(expected, rel=1e-5)
        assert seen.output.shape == request.x.shape
    assert torch.equal(criterion.seen[1].output, criterion.seen[2].output)
    x_in = states[0] * torch.tensor(plan.input_scales[0]).float()
    u = network(
        torch.cat([x_in] * 2),
        torch.full((2,), plan.timesteps[0]).float(),
        request.conditioning["shift"],
    )
    torch.testing.assert_close(criterion.seen[0].output, -u[:1] + 2 * u[1:])


def test_the_summary_says_why_nothing_was_skipped() -> None:
    for strict, told in (
        (Adaptive(mode="paper", threshold=0.0), "8 by warm-up, 4 by criterion; smallest criterion"),
        (Adaptive(threshold=0.0), "4 by warm-up, 4 by criterion, 4 by last; smallest criterion"),
    ):
        request = Request(plan_of("ddim", 6), latents(1, 2), conditioning(1, 2, 1), method=strict)
        note = solo(request).summary.note
        assert note.startswith(f"nothing was skipped: of 12 calls {told} ")
        assert note == stepwise(request)[1].note
    short = replace(request, plan=plan_of("ddim", 3))
    assert solo(short).summary.note == "nothing was skipped: of 6 calls 4 by warm-up, 2 by last"
    assert solo(replace(request, method=PAPER, plan=plan_of("ddim", 14))).summary.note == ""
