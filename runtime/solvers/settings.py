"""`Solver`: the settings of every sampler that is written down here, and how they become a plan."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from sidestep.runtime.grids import Custom, Grid, find_grid
from sidestep.runtime.plan import Plan
from sidestep.runtime.predictions import Prediction, find_prediction
from sidestep.runtime.program import Program
from sidestep.runtime.schedules import Schedule
from sidestep.runtime.solvers.exponential import Integrator
from sidestep.runtime.solvers.heun import write_heun
from sidestep.runtime.solvers.ipndm import ADAMS_BASHFORTH, write_ipndm
from sidestep.runtime.solvers.multistep import Multistep, write_multistep
from sidestep.runtime.solvers.problem import Point, Problem
from sidestep.runtime.solvers.singlestep import Singlestep, write_singlestep, write_step
from sidestep.runtime.solvers.spans import multistep_spans, singlestep_spans, spans_from_call
from sidestep.runtime.solvers.unipc import UniPC, write_unipc
from sidestep.runtime.thresholding import DynamicThreshold

_CHOICES: dict[str, tuple[str, ...]] = {
    "algorithm": ("dpmsolver++", "dpmsolver", "unipc", "unipc-noise", "heun", "ipndm"),
    "method": ("multistep", "singlestep"),
    "variant": ("midpoint", "heun", "bh1", "bh2"),
    "noise": ("ode", "sde", "ancestral"),
    "third_order": ("shipped", "true"),
    "start_order": ("ramp", "singlestep"),
    "inner": ("grid", "uniform"),
    "orders": ("fast", "fixed"),
    "coordinates": ("native", "ve"),
}


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A sampler, apart from schedule, grid and number of steps.

    ``steps`` of `plan` always means model calls. DDIM and Euler are order 1.

    Attributes:
        algorithm: ``dpmsolver++`` integrates the data prediction, ``dpmsolver`` the noise
            prediction; ``unipc`` and ``unipc-noise`` likewise; ``heun`` (EDM's) and ``ipndm``.
        order: 1 to 3 (ipndm: 4; heun: 2).
        method: ``multistep`` or ``singlestep`` (dpmsolver only).
        variant: ``midpoint`` or ``heun`` (the official code's ``taylor``) for dpmsolver, ``bh1`` or
            ``bh2`` for unipc. None: midpoint, bh2.
        noise: ``ode``; ``sde``, the reverse SDE; ``ancestral``, DDIM with eta (order 1 only).
        eta: How stochastic: 0 is the ODE, 1 the full reverse SDE.
        third_order: Of multistep order 3: ``shipped`` as in every published code (of second order
            in fact), or ``true``.
        start_order: How a multistep solver begins: ``ramp``, orders 1, 2, 3; or ``singlestep``, one
            two-call step of order 2, without which ``third_order="true"`` is not of third order.
        inner: Inner points of singlestep: on the ``grid`` of all calls (official code, diffusers),
            or ``uniform`` in lambda inside steps that follow the grid (the paper).
        orders: Of singlestep: ``fast`` mixes orders to make exactly ``steps`` calls; ``fixed``
            makes only whole steps, ``steps // order * order`` calls.
        lower_order_final: Whether the order falls to 1 over the last steps: always (True), never
            (False), or below this number of calls (15 in diffusers, 10 in the official code). A
            step to ``sigma = 0`` is of order 1 whatever this says, except in ipndm; elsewhere
            True costs every order above 2 its asymptotic rate.
        corrector: Whether unipc corrects.
        denoise_to_zero: Spend the last call on ``x0`` at a grid's end above zero.
        inverse: Run the grid backwards, from data to noise.
        coordinates: ``native``, or ``ve``: the latent is ``x / alpha`` as in diffusers' Euler.

    Raises:
        ValueError: A setting is unknown, or contradicts another.
    """

    algorithm: str = "dpmsolver++"
    order: int = 2
    method: str = "multistep"
    variant: str | None = None
    noise: str = "ode"
    eta: float = 1.0
    third_order: str = "shipped"
    start_order: str = "ramp"
    inner: str = "grid"
    orders: str = "fast"
    lower_order_final: bool | int = True
    corrector: bool = True
    denoise_to_zero: bool = False
    inverse: bool = False
    coordinates: str = "native"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "variant" and value is None):
                raise ValueError(f"Solver: {name} is {value!r}, expected {', '.join(choices)}")
        for problem, wrong in self._contradictions().items():
            if wrong:
                raise ValueError(f"Solver: {problem}")

    def _contradictions(self) -> dict[str, bool]:
        dpm = self.algorithm in ("dpmsolver", "dpmsolver++")
        uni = self.algorithm in ("unipc", "unipc-noise")
        highest = {"heun": 2, "ipndm": len(ADAMS_BASHFORTH)}.get(self.algorithm, 3)
        lowest = 2 if self.algorithm == "heun" else 1
        two_calls = self.start_order == "singlestep"
        single = self.method == "singlestep"
        variants = {"dpmsolver": ("midpoint", "heun"), "unipc": ("bh1", "bh2")}
        allowed = variants.get("unipc" if uni else "dpmsolver" if dpm else "", ())
        return {
            f"order is {self.order}, expected {lowest} to {highest} for {self.algorithm}": (
                not lowest <= self.order <= highest
            ),
            f"variant {self.variant!r} does not belong to {self.algorithm}": (
                self.variant is not None and self.variant not in allowed
            ),
            f"method 'singlestep' needs a dpmsolver algorithm, got {self.algorithm}": (
                single and not dpm
            ),
            f"noise {self.noise!r} needs a dpmsolver algorithm, got {self.algorithm}": (
                self.noise != "ode" and not dpm
            ),
            f"noise 'ancestral' needs order 1, got {self.order}": (
                self.noise == "ancestral" and self.order != 1
            ),
            f"eta is {self.eta}, expected 0 <= eta <= 1": not 0 <= self.eta <= 1,
            "inverse needs noise 'ode'": self.inverse and self.noise != "ode",
            "inverse and denoise_to_zero contradict each other": (
                self.inverse and self.denoise_to_zero
            ),
            "start_order 'singlestep' needs a multistep dpmsolver of order 2 or 3": (
                two_calls and (not dpm or single or self.order == 1)
            ),
        }

    @property
    def stochastic(self) -> bool:
        """Whether the sampler draws noise."""
        return self.noise != "ode" and self.eta > 0

    @property
    def label(self) -> str:
        """The settings that are not the defaults, for a plan's name."""
        parts = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if f.name not in ("algorithm", "order") and getattr(self, f.name) != f.default
        ]
        return f"{self.algorithm} order {self.order}" + "".join(f", {part}" for part in parts)

    def plan(
        self,
        schedule: Schedule,
        grid: Grid | str,
        steps: int | None = None,
        prediction: str | Prediction = "epsilon",
        *,
        threshold: DynamicThreshold | None = None,
        begin: int = 0,
        name: str | None = None,
    ) -> Plan:
        """Writes the sampler down for a schedule, a grid and a number of model calls.

        Args:
            steps: Model calls; may be left out where the grid is `Custom`.
            prediction: What the model's output means.
            threshold: Dynamic thresholding of the data prediction.
            begin: Leave out that many of the first calls, as image-to-image does.
            name: The plan's name; None for one made of the settings.

        Raises:
            ValueError: The settings, the grid and the schedule do not go together.
        """
        grid = find_grid(grid) if isinstance(grid, str) else grid
        steps = self._checked_steps(schedule, grid, steps, begin)
        problem = Problem(
            schedule=schedule,
            prediction=find_prediction(prediction),
            exploding=self.coordinates == "ve",
            threshold=threshold,
            draws=int(self.stochastic),
        )
        spans = self._spans(problem, grid, steps, begin)
        if self.stochastic and self.algorithm == "dpmsolver" and spans[0][0].alpha == 0:
            raise ValueError(
                "Solver.plan: the noise-prediction SDE has no finite step from a start without "
                "signal, expected algorithm 'dpmsolver++', or a later start"
            )
        program = Program(name=name or self.label, threshold=threshold)
        program.initial_scale = problem.initial_scale(spans[0][0])
        self.write(program, problem, spans)
        return program.plan()

    def _checked_steps(self, schedule: Schedule, grid: Grid, steps: int | None, begin: int) -> int:
        if steps is None:
            if not isinstance(grid, Custom):
                raise ValueError("Solver.plan: steps is None, expected a number for this grid")
            steps = len(grid.times(schedule)) - 1 + self.denoise_to_zero
        if steps < 1 + self.denoise_to_zero:
            least = "2 with denoise_to_zero" if self.denoise_to_zero else "1"
            raise ValueError(f"Solver.plan: steps is {steps}, expected at least {least}")
        if not 0 <= begin < steps:
            raise ValueError(f"Solver.plan: begin is {begin}, expected 0 <= begin < {steps} steps")
        if grid.end(schedule) == 0 and (self.denoise_to_zero or self.inverse):
            setting = "inverse" if self.inverse else "denoise_to_zero"
            raise ValueError(f"Solver.plan: {setting} needs a grid that ends above sigma = 0")
        return steps

    def _spans(self, problem: Problem, grid: Grid, steps: int, begin: int) -> list[list[Point]]:
        """For each step its points: one call at each but the last."""
        calls = steps - self.denoise_to_zero
        if self.method == "singlestep" or self.algorithm == "heun":
            spans = singlestep_spans(
                problem,
                grid,
                calls,
                self.order,
                inner="end" if self.algorithm == "heun" else self.inner,
                fast=self.orders == "fast",
                inverse=self.inverse,
            )
        else:
            two_calls = self.start_order == "singlestep"
            spans = multistep_spans(problem, grid, calls, inverse=self.inverse, two_calls=two_calls)
        spans = spans_from_call(spans, begin)
        if not spans:
            raise ValueError(f"Solver.plan: no step is left of {steps} after begin = {begin}")
        if self.denoise_to_zero:
            spans.append([spans[-1][-1], problem.point(0.0)])
        return spans

    def write(self, program: Program, problem: Problem, spans: list[list[Point]]) -> None:
        """Writes the steps down: what a solver of one's own, a subclass, does in its own way.

        Args:
            spans: For each step its points, one call at each but the last.
        """
        data = self.algorithm in ("dpmsolver++", "unipc")
        eta = self.eta if self.stochastic else 0.0
        integrator = Integrator(data=data, eta=eta, ancestral=self.noise == "ancestral")
        single = Singlestep(integrator=integrator, midpoint=self.variant != "heun")
        calls = sum(len(span) - 1 for span in spans)
        lower = self.lower_order_final
        lower = lower if isinstance(lower, bool) else calls < lower
        if self.algorithm == "heun":
            return write_heun(program, problem, spans)
        if self.method == "singlestep":
            return write_singlestep(program, problem, spans, single)
        nodes: list[Point] = []
        if len(spans[0]) == 3:
            write_step(program, problem, spans[0], single)
            nodes = [spans[0][1], spans[0][0]][: self.order - 1]
            spans = spans[1:]
            if not spans:
                return None
        points = [spans[0][0], *(span[-1] for span in spans)]
        if self.algorithm == "ipndm":
            return write_ipndm(program, problem, points, self.order, lower_order_final=lower)
        if self.algorithm in ("unipc", "unipc-noise"):
            rule = UniPC(
                integrator=integrator,
                order=self.order,
                bh1=self.variant == "bh1",
                corrector=self.corrector,
            )
            return write_unipc(program, problem, points, rule, lower_order_final=lower)
        multi = Multistep(
            integrator=integrator,
            order=self.order,
            midpoint=self.variant != "heun",
            true_third=self.third_order == "true",
        )
        return write_multistep(
            program, problem, points, multi, lower_order_final=lower, nodes=nodes
        )

    def point(self, schedule: Schedule, t: float) -> Point:
        """Signal and noise of the latent that is integrated, at the schedule's time ``t``."""
        return Problem(
            schedule=schedule,
            prediction=find_prediction("epsilon"),
            exploding=self.coordinates == "ve",
        ).point(t)

    def replace(self, **settings: object) -> Solver:
        """The same solver with some settings changed."""
        return replace(self, **settings)  # type: ignore[arg-type]
