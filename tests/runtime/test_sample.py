"""`sample`: the dialect of k-diffusion, checked with its samplers written out from their papers."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criterion import Course, Decision, Observation
from sidestep.runtime.sample import sample
from sidestep.runtime.solvers import SOLVERS, Solver

# The state is fp32: each step rounds x once, and x falls from 15 to 1 on the way.
FP32 = {"rtol": 0.0, "atol": 2e-5}


def karras(n: int, high: float = 14.6, low: float = 0.03) -> list[float]:
    """EDM eq. 5 with rho = 7, and 0 at the end."""
    root = [high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7)) for i in range(n)]
    return [r**7 for r in root] + [0.0]


def denoise(x: Tensor, sigma: Tensor, shift: float | Tensor = 0.0) -> Tensor:
    """The posterior mean of two points at +-1 (and `shift`), which is not linear in x."""
    level = sigma.view(-1, *[1] * (x.dim() - 1))
    return torch.tanh((x - shift) / (level**2 + 0.2)) + shift


def start(rows: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    noise = torch.randn(rows, 4, 3, 5, generator=torch.Generator().manual_seed(seed))
    return (14.6 * noise).to(dtype)


def euler(x: Tensor, sigmas: list[float], **extra: Any) -> Tensor:
    """Karras et al. 2022, Algorithm 1 without its second-order correction: d = (x - D) / sigma."""
    for s, t in pairwise(sigmas):
        d = (x - denoise(x, x.new_full((len(x),), s), **extra)) / s
        x = x + (t - s) * d
    return x


def heun(x: Tensor, sigmas: list[float]) -> Tensor:
    """Karras et al. 2022, Algorithm 1."""
    for s, t in pairwise(sigmas):
        d = (x - denoise(x, x.new_full((len(x),), s))) / s
        y = x + (t - s) * d
        if t > 0:
            d = 0.5 * d + 0.5 * (y - denoise(y, x.new_full((len(x),), t))) / t
            y = x + (t - s) * d
        x = y
    return x


def dpmpp_2m(x: Tensor, sigmas: list[float]) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), Algorithm 2 with alpha = 1: lambda = -ln sigma."""
    older, h_older = None, 0.0
    for s, t in pairwise(sigmas):
        d = newest = denoise(x, x.new_full((len(x),), s))
        h = math.log(s / t) if t > 0 else math.inf
        if older is not None and t > 0:
            r = h_older / h
            d = (1 + 1 / (2 * r)) * newest - 1 / (2 * r) * older
        x = t / s * x - math.expm1(-h) * d
        older, h_older = newest, h
    return x


def dpmpp_2s(x: Tensor, sigmas: list[float]) -> Tensor:
    """Lu et al. 2022 (DPM-Solver++), Algorithm 1 with r = 1/2."""
    for s, t in pairwise(sigmas):
        d = denoise(x, x.new_full((len(x),), s))
        if t > 0:
            h, middle = math.log(s / t), math.sqrt(s * t)
            u = middle / s * x - math.expm1(-0.5 * h) * d
            d = denoise(u, x.new_full((len(x),), middle))
            x = t / s * x - math.expm1(-h) * d
        else:
            x = d
    return x


@pytest.mark.parametrize(
    ("solver", "formula"),
    [("euler", euler), ("ddim", euler), ("heun", heun), ("dpmsolver++2m", dpmpp_2m),
     ("dpmsolver++2s", dpmpp_2s)],
)  # fmt: skip
@pytest.mark.parametrize("steps", [2, 3, 12])
def test_equals_the_published_formula(solver: str, formula: Any, steps: int) -> None:
    sigmas = karras(steps)
    x = start()
    result = sample(denoise, x, torch.tensor(sigmas, dtype=torch.float64), solver=solver)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, formula(x, sigmas), **FP32)


@pytest.mark.parametrize(("solver", "formula"), [("heun", heun), ("dpmsolver++2s", dpmpp_2s)])
def test_a_part_of_a_trajectory_has_whole_steps(solver: str, formula: Any) -> None:
    sigmas = karras(7)[2:6]
    x = start()
    torch.testing.assert_close(
        sample(denoise, x, sigmas, solver=solver), formula(x, sigmas), **FP32
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("ends", [8, 9])
def test_every_solver_runs_on_given_sigmas(solver: str, ends: int) -> None:
    """With a constant x0 the ODE is x = x0 + sigma eps, which every solver integrates exactly."""
    sigmas = karras(9)[: ends + 1]
    calls: list[float] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma[0]))
        return torch.full_like(x, 0.5)

    steps: list[int] = []
    x = start(2, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    result = sample(
        model,
        x,
        sigmas,
        callback=lambda at: steps.append(at["i"]),
        solver=solver,
        generator=generator,
    )
    assert steps == list(range(ends))
    assert set(torch.tensor(sigmas[:-1]).tolist()) <= set(calls)  # fp32 of fp64 levels
    settings = SOLVERS[solver]
    if not settings.stochastic:
        torch.testing.assert_close(result, 0.5 + sigmas[-1] / sigmas[0] * (x - 0.5), **FP32)
    elif settings.algorithm == "dpmsolver++":  # noise prediction needs far smaller steps here
        assert float((result - 0.5).abs().max()) < 5 * sigmas[-1] + 2e-5


def test_one_step_is_the_denoised() -> None:
    x = start(dtype=torch.float32)
    for solver in ("euler", "heun", "dpmsolver++3s", "dpmsolver++3m-true"):
        result = sample(denoise, x, [14.6, 0.0], solver=solver)
        torch.testing.assert_close(result, denoise(x, x.new_full((3,), 14.6)), rtol=0, atol=0)


def test_the_callback_sees_what_the_dialect_says() -> None:
    sigmas = torch.tensor(karras(5))
    x, seen = start(dtype=torch.float32), []
    result = sample(denoise, x, sigmas, {}, seen.append, True, solver="euler")
    assert [set(at) for at in seen] == [{"x", "i", "sigma", "sigma_hat", "denoised"}] * 5
    assert [at["i"] for at in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[0]["x"], x)
    for i, at in enumerate(seen):
        assert at["sigma"] == at["sigma_hat"] == sigmas[i]
        level = at["sigma"].expand(3)
        torch.testing.assert_close(at["denoised"], denoise(at["x"], level), rtol=0, atol=0)
        later = seen[i + 1]["x"] if i < 4 else result  # kept tensors are not written into
        d = (at["x"] - at["denoised"]) / at["sigma"]
        torch.testing.assert_close(later, at["x"] + (sigmas[i + 1] - sigmas[i]) * d, **FP32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_model_is_called_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    seen = set()

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        seen.update({x.dtype, sigma.dtype})
        assert sigma.shape == (3,)
        return denoise(x, sigma)

    x = start(dtype=dtype)
    result = sample(model, x, karras(12))
    assert seen == {dtype}
    assert result.dtype == dtype
    # twelve roundings of the model's input and output, each of one part in 2^11 or 2^8
    error = (result.double() - dpmpp_2m(x.double(), karras(12))).abs()
    assert float(error.mean()) < 8 * torch.finfo(dtype).eps


def test_extra_arguments_reach_the_model() -> None:
    x, shift = start(), torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64).view(3, 1, 1, 1)
    result = sample(denoise, x, karras(6), extra_args={"shift": shift}, solver="euler")
    torch.testing.assert_close(result, euler(x, karras(6), shift=shift), **FP32)


def test_a_model_in_another_dtype_and_layout() -> None:
    x = start(dtype=torch.float32)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x.double(), sigma).to(memory_format=torch.channels_last)

    torch.testing.assert_close(
        sample(model, x, karras(6)), dpmpp_2m(x.double(), karras(6)).float(), **FP32
    )


def test_noise_is_drawn_for_the_steps_that_use_it() -> None:
    sigmas, drawn = karras(5), []

    def noise_sampler(sigma: Tensor, following: Tensor) -> Tensor:
        drawn.append((float(sigma), float(following)))
        return torch.randn(3, 4, 3, 5, generator=generator)

    generator = torch.Generator().manual_seed(3)
    x = start(dtype=torch.float32)
    own = sample(denoise, x, sigmas, solver="euler-ancestral", noise_sampler=noise_sampler)
    expected = list(pairwise(sigmas[:-1]))  # none for the step to 0
    torch.testing.assert_close(torch.tensor(drawn), torch.tensor(expected))
    seeded = sample(
        denoise, x, sigmas, solver="euler-ancestral", generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(own, seeded)


def test_ancestral_euler_is_the_published_one() -> None:
    """sigma_up^2 = t^2 (s^2 - t^2) / s^2, sigma_down^2 = t^2 - sigma_up^2 (DDIM with eta = 1)."""
    sigmas, x = karras(6), start()
    generator = torch.Generator().manual_seed(5)
    result = sample(denoise, x, sigmas, solver="euler-ancestral", generator=generator)
    generator.manual_seed(5)
    for s, t in pairwise(sigmas):
        up = math.sqrt(t**2 * (s**2 - t**2) / s**2)
        d = (x - denoise(x, x.new_full((3,), s))) / s
        x = x + (math.sqrt(t**2 - up**2) - s) * d
        if t > 0:
            x = x + up * torch.randn(3, 4, 3, 5, generator=generator)
    torch.testing.assert_close(result, x, **FP32)


def test_a_generator_for_each_row_makes_rows_independent() -> None:
    x = start(dtype=torch.float32)

    def generators(rows: range) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(10 + i) for i in rows]

    together = sample(
        denoise, x, karras(5), solver="sde-dpmsolver++2m", generator=generators(range(3))
    )
    alone = sample(
        denoise, x[1:2], karras(5), solver="sde-dpmsolver++2m", generator=generators(range(1, 2))
    )
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], r"sample: sigmas has shape \[1\], expected \[n \+ 1\] with n at least 1"),
        ([[1.0, 0.0]], r"sample: sigmas has shape \[1, 2\]"),
        ([3.0, 1.0, 2.0, 0.0], r"sigmas\[1\] is 1.0 and sigmas\[2\] 2.0, expected falling"),
        ([3.0, 3.0, 0.0], r"sigmas\[0\] is 3.0 and sigmas\[1\] 3.0, expected falling"),
        ([0.0, 0.0], r"sigmas\[0\] is 0.0 and sigmas\[1\] 0.0, expected falling"),
        ([3.0, -1.0], r"sigmas\[1\] is -1.0, expected 0 or above"),
        ([3.0, math.nan, 0.0], r"sigmas\[1\] is nan, expected a finite number"),
        ([math.inf, 1.0, 0.0], r"sigmas\[0\] is inf, expected a finite number"),
    ],
)
def test_sigmas_are_checked(sigmas: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(denoise, start(), sigmas)


def test_other_arguments_are_checked() -> None:
    x = start()
    with pytest.raises(ValueError, match=r"x has shape \[0, 4\], expected \[B, ...\] with at leas"):
        sample(denoise, torch.zeros(0, 4), karras(3))
    with pytest.raises(ValueError, match=r"x has shape \[4\]"):
        sample(denoise, torch.zeros(4), karras(3))
    with pytest.raises(TypeError, match=r"x has dtype torch.int64, expected a floating-point one"):
        sample(denoise, torch.ones(2, 4, dtype=torch.int64), karras(3))
    with pytest.raises(ValueError, match=r"model returned shape \[1, 4, 3, 5\], expected \[3, 4"):
        sample(lambda x, sigma: x[:1], x, karras(3))
    with pytest.raises(TypeError, match="the model returned a tuple, expected the denoised tensor"):
        sample(lambda x, sigma: (x,), x, karras(3))
    with pytest.raises(ValueError, match=r"noise_sampler returned shape \[1\], expected \[3, 4, 3"):
        sample(
            denoise,
            x,
            karras(3),
            solver="euler-ancestral",
            noise_sampler=lambda s, t: x[0, 0, 0, :1],
        )
    with pytest.raises(ValueError, match="solver 'eular' is unknown, expected one of ddim"):
        sample(denoise, x, karras(3), solver="eular")
    with pytest.raises(ValueError, match="solver has inverse=True, expected False"):
        sample(denoise, x, karras(3), solver=Solver(inverse=True))
    with pytest.raises(ValueError, match="2 generators, expected one or 3"):
        sample(denoise, x, karras(3), generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(ValueError, match="generator and noise_sampler were both given"):
        sample(denoise, x, karras(3), generator=torch.Generator(), noise_sampler=torch.add)
    with pytest.raises(ValueError, match="report was given without a method"):
        sample(denoise, x, karras(3), report=print)


class Alternate:
    """Row i skips every step whose index is odd, if its turn of `rows` says so; holds or not."""

    history = 2

    def __init__(self, skipping: list[bool], weights: list[float] | None = None) -> None:
        self.skipping, self.weights = skipping, weights

    def criterion(self) -> "Alternate":
        return self

    def start(self, course: Course) -> None:
        self.course = course

    def observe(self, seen: Observation) -> Decision:
        odd = seen.step % 2 == 0 and seen.step > 1
        compute = [not (odd and skips) for skips in self.skipping]
        weights = None if self.weights is None else [self.weights] * len(compute)
        return Decision(compute=compute, reasons=["" for _ in compute], weights=weights)


def test_a_method_that_never_skips_changes_nothing() -> None:
    x, reports = start(dtype=torch.float32), []
    plain = sample(denoise, x, karras(12))
    method = Adaptive(mode="paper", threshold=0.0)
    assert torch.equal(sample(denoise, x, karras(12), method=method, report=reports.append), plain)
    assert reports[0].nfe == (12.0, 12.0, 12.0)
    assert reports[0].ticks == reports[0].steps == 12
    assert "nothing was skipped" in reports[0].note


@pytest.mark.parametrize("weights", [None, [2.0, -1.0]])
def test_rows_that_skip_go_on_with_their_outputs(weights: list[float] | None) -> None:
    sigmas, x = karras(9), start()
    shift = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64).view(3, 1, 1, 1)
    rows, reports = [], []

    def model(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        rows.append(len(x))
        return denoise(x, sigma, shift)

    method = Alternate([False, True, True], weights)
    result = sample(
        model,
        x,
        sigmas,
        {"shift": shift},
        solver="euler",
        method=method,
        report=reports.append,
    )
    torch.testing.assert_close(result[:1], euler(x, sigmas, shift=shift)[:1], **FP32)
    assert rows == [3, 3, 3, 1, 3, 1, 3, 1, 3]
    assert reports[0].nfe == (9.0, 6.0, 6.0)
    assert method.course.log_snr == pytest.approx([-math.log(s) for s in sigmas[:-1]])
    outputs: list[Tensor] = []
    for k, (s, t) in enumerate(pairwise(sigmas)):  # the same by hand, for the rows that skip
        if k < 3 or k % 2 == 0:
            outputs.append(denoise(x, x.new_full((3,), s), shift))
            d = outputs[-1]
        else:
            d = outputs[-1] if weights is None else 2 * outputs[-1] - outputs[-2]
        x = x + (t - s) * (x - d) / s
    torch.testing.assert_close(result[1:], x[1:], **FP32)


def test_methods_are_refused_where_steps_mean_nothing() -> None:
    method = Adaptive(mode="paper")
    with pytest.raises(ValueError, match=r"heun order 2.* makes 2 model calls a step, and part"):
        sample(denoise, start(), karras(5), solver="heun", method=method)
    with pytest.raises(ValueError, match="adds noise at every step, which hides how fast"):
        sample(denoise, start(), karras(5), solver="euler-ancestral", method=method)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("solver", ["dpmsolver++2m", "euler-ancestral"])
def test_the_default_dtype_is_no_matter(dtype: torch.dtype, solver: str) -> None:
    x, sigmas, methods = start(dtype=torch.float32), karras(9), [None]
    if not SOLVERS[solver].stochastic:
        methods.append(Alternate([True] * 3, [1.7, -0.7]))

    def runs() -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [
            sample(denoise, x, sigmas, solver=solver, method=method, generator=generator)
            for method in methods
        ]

    expected = runs()
    torch.set_default_dtype(dtype)
    try:
        results = runs()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, results, expected))
