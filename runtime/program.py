"""Writing a sampler down: linear forms, and the pass that turns named registers into a `Plan`.

A solver is written with symbols, as in its paper::

    program = Program("DDIM")
    x, u = program.x, program.u
    for k in range(n):
        x0 = a[k] * x + b[k] * u
        program.step(t[k], x=A[k] * x + B[k] * x0)
    plan = program.plan()

The symbols stand for the values at the start of the step, so the same names serve every step.
`Program.plan` drops registers that nobody reads, merges registers that hold the same value, and
gives the rest a place such that a value that is only kept is not moved: the shift of a multistep
history costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from sidestep.runtime.plan import Plan
from sidestep.runtime.thresholding import DynamicThreshold


class Form(dict[str, float]):
    """A linear combination of symbols: ``{symbol: coefficient}`` with +, - and * number."""

    def __add__(self, other: Form) -> Form:
        total = Form(self)
        for symbol, coefficient in other.items():
            total[symbol] = total.get(symbol, 0.0) + coefficient
        return total

    def __mul__(self, factor: float) -> Form:
        return Form({symbol: factor * coefficient for symbol, coefficient in self.items()})

    __rmul__ = __mul__

    def __sub__(self, other: Form) -> Form:
        return self + other * -1.0

    def __neg__(self) -> Form:
        return self * -1.0

    def __truediv__(self, divisor: float) -> Form:
        return self * (1.0 / divisor)


@dataclass
class _Step:
    t: float
    scale: float
    registers: dict[str, Form]
    error: Form | None
    log_snr: float | None
    data: Form | None
    draws: int | None


@dataclass
class Program:
    """Collects steps; see the module's text for how a solver is written.

    Attributes:
        name: The name of the plan that comes out.
        initial_scale: What unit noise is multiplied by before step 0.
        threshold: Dynamic thresholding of the ``data`` form of every step, whose result takes
            the place of ``u`` in the other forms.
    """

    name: str
    initial_scale: float = 1.0
    threshold: DynamicThreshold | None = None
    _steps: list[_Step] = field(default_factory=list)

    x = Form({"x": 1.0})
    u = Form({"u": 1.0})

    def register(self, name: str) -> Form:
        """The value of a named register at the start of the step."""
        if name in ("u", "x") or name.startswith("noise"):
            raise ValueError(f"Program.register: {name!r} is taken, expected another name")
        return Form({name: 1.0})

    def noise(self, draw: int = 0) -> Form:
        """The step's unit normal draw."""
        return Form({f"noise{draw}": 1.0})

    def step(
        self,
        t: float,
        *,
        x: Form,
        scale: float = 1.0,
        error: Form | None = None,
        log_snr: float | None = None,
        data: Form | None = None,
        draws: int | None = None,
        **registers: Form,
    ) -> None:
        """Adds a step: one model call on ``scale * x`` at time ``t``, then the assignments.

        Args:
            x: The next latent.
            error: The embedded error estimate, as a form.
            log_snr: lambda at the call, where it is known.
            data: The data prediction that the threshold acts on.
            draws: Noise tensors drawn, where that is more than are used.
            registers: The next value of every register that is to be kept.
        """
        forms = {"x": x, **registers}
        self._steps.append(_Step(t, scale, forms, error, log_snr, data, draws))

    def plan(self) -> Plan:
        """The finished plan.

        Raises:
            ValueError: A step reads a register that no earlier step wrote, or there are too many.
        """
        steps = self._merge_equal_registers()
        live = _live_before(steps)
        if unwritten := sorted(live[0] - {"x"}):
            raise ValueError(f"Program {self.name}: {unwritten} are read before being written")
        places, count = _place(steps, live)
        draws = 1 + max((_draw_index(s) for step in steps for s in _symbols(step)), default=-1)
        draws = max([draws, *(step.draws or 0 for step in steps)])
        K, columns = len(steps), count + 1 + draws
        matrices = np.tile(np.eye(count, columns), (K, 1, 1))
        errors = np.zeros((K, columns))
        data = np.zeros((K, count + 1))
        for k, step in enumerate(steps):
            for name in live[k + 1]:
                matrices[k, places[k + 1][name]] = _row(
                    step.registers[name], places[k], count, columns
                )
            errors[k] = _row(step.error or Form(), places[k], count, columns)
            data[k] = _row(step.data or Form(), places[k], count, count + 1)
        known = [step.draws for step in steps]
        log_snr = [step.log_snr for step in steps]
        return Plan(
            name=self.name,
            matrices=matrices,
            timesteps=np.array([step.t for step in steps]),
            input_scales=np.array([step.scale for step in steps]),
            initial_scale=self.initial_scale,
            draws=None if None in known else np.array(known),
            errors=errors if any(step.error for step in steps) else None,
            log_snr=None if None in log_snr else np.array(log_snr, dtype=np.float64),
            threshold=self.threshold,
            data_maps=data if self.threshold is not None else None,
        )

    def _merge_equal_registers(self) -> list[_Step]:
        """Registers that were assigned the same form hold the same value: read one of them."""
        same: dict[str, str] = {}
        steps = []
        for step in self._steps:
            registers = {name: _rename(form, same) for name, form in step.registers.items()}
            error = None if step.error is None else _rename(step.error, same)
            data = None if step.data is None else _rename(step.data, same)
            steps.append(replace(step, registers=registers, error=error, data=data))
            first: dict[tuple[tuple[str, float], ...], str] = {}
            same = {}
            for name in sorted(registers, key=lambda n: (n != "x", n)):
                key = tuple(sorted(registers[name].items()))
                same[name] = first.setdefault(key, name)
        return steps


def _rename(form: Form, same: dict[str, str]) -> Form:
    """``form`` with merged registers renamed and zero coefficients left out."""
    total = Form()
    for symbol, coefficient in form.items():
        total = total + Form({same.get(symbol, symbol): coefficient})
    return Form({symbol: c for symbol, c in total.items() if c != 0})


def _symbols(step: _Step) -> list[str]:
    forms = [*step.registers.values(), step.error or Form(), step.data or Form()]
    return [symbol for form in forms for symbol in form]


def _draw_index(symbol: str) -> int:
    return int(symbol[5:]) if symbol.startswith("noise") else -1


def _live_before(steps: list[_Step]) -> list[set[str]]:
    """For each boundary between steps, the registers whose value is still needed."""
    live: list[set[str]] = [{"x"}]
    for step in reversed(steps):
        needed = {"x"}
        for name in live[-1]:
            if name not in step.registers:
                raise ValueError(f"Program: register {name!r} is read but was not kept")
            needed |= set(step.registers[name])
        for form in (step.error, step.data):
            needed |= set(form or ())
        live.append({s for s in needed if s != "u" and not s.startswith("noise")})
    return live[::-1]


def _place(steps: list[_Step], live: list[set[str]]) -> tuple[list[dict[str, int]], int]:
    """A place for every live register at every boundary; a value that is only kept stays put."""
    places = [{"x": 0}]
    count = 1
    for step, needed in zip(steps, live[1:], strict=True):
        before, after = places[-1], {"x": 0}
        for name in sorted(needed - {"x"}):
            form = step.registers[name]
            if len(form) == 1:
                ((symbol, coefficient),) = form.items()
                old = before.get(symbol, 0)
                if coefficient == 1.0 and old and old not in after.values():
                    after[name] = old
        for name in sorted(needed - set(after)):
            after[name] = next(i for i in range(1, 1 + len(needed)) if i not in after.values())
        places.append(after)
        count = max(count, 1 + max(after.values()))
    return places, count


def _row(form: Form, places: dict[str, int], registers: int, columns: int) -> np.ndarray:
    """The coefficients of ``form`` in the column order of a plan: registers, u, noise."""
    row = np.zeros(columns)
    for symbol, coefficient in form.items():
        draw = _draw_index(symbol)
        column = registers + 1 + draw if draw >= 0 else places.get(symbol, registers)
        row[column] += coefficient
    return row
