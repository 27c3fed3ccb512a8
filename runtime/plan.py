"""Plans: a sampler written as data, a linear program over a few latent-sized registers.

Step ``k`` of a plan calls the model once, on ``input_scales[k] * registers[0]`` at time
``timesteps[k]``, and then applies one small matrix to everything that is known:

    registers' = matrices[k] . [registers; u; noise]        u: the raw model output

``registers[0]`` is the latent ``x``.  Every sampler of the DPM-Solver family, and every linear
scheduler of diffusers, is such a table; `Plan.run` is the definition of what a table means, and
every fast path is compared with it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidestep.runtime.thresholding import DynamicThreshold

Model = Callable[[Tensor, float], Tensor]
Noise = Callable[[int, int], Tensor] | Tensor

_ARRAYS = ("matrices", "timesteps", "input_scales", "draws", "errors", "log_snr", "data_maps")
_MAX_REGISTERS = 6


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Plan:
    """A sampler as a table: immutable, hashable, printable, one small file.

    K steps (model calls), R registers, J noise draws a step at most.

    Attributes:
        name: What a person calls this sampler.
        matrices: ``[K, R, R + 1 + J]`` float64, columns ``[registers; u; noise]``.
        timesteps: ``[K]`` float64, the model's own time at each call.
        input_scales: ``[K]`` float64, the model reads ``input_scales[k] * registers[0]``.
        initial_scale: What unit noise is multiplied by before step 0, above 0.
        draws: ``[K]`` int64, noise tensors the sampler draws at each step (used or not), at most J.
            Columns of ``matrices`` beyond them are not read.
        errors: ``[K, R + 1 + J]`` float64 or None, the embedded error estimate: the update of
            the sampler's order minus the update one order below.
        log_snr: ``[K]`` float64 or None, ``lambda = ln(alpha / sigma)`` at each call.
        threshold: None, or the non-linear stage that dynamic thresholding puts between the model
            and the matrices. ``matrices`` then act on its result in the place of ``u``.
        data_maps: ``[K, R + 1]`` float64 or None, the data prediction
            ``x0 = data_maps[k] . [registers; u]`` that ``threshold`` acts on.

    Raises:
        ValueError: An array has the wrong shape, a number is out of range, or not finite.
    """

    name: str
    matrices: np.ndarray
    timesteps: np.ndarray
    input_scales: np.ndarray
    initial_scale: float = 1.0
    draws: np.ndarray | None = None
    errors: np.ndarray | None = None
    log_snr: np.ndarray | None = None
    threshold: DynamicThreshold | None = None
    data_maps: np.ndarray | None = None
    _digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", str(self.name))
        object.__setattr__(self, "initial_scale", float(self.initial_scale))
        if not 0 < self.initial_scale < math.inf:
            raise ValueError(
                f"Plan: initial_scale is {self.initial_scale}, expected a finite number above 0"
            )
        matrices = np.asarray(self.matrices, dtype=np.float64)
        if matrices.ndim != 3 or matrices.shape[2] <= matrices.shape[1] or matrices.shape[1] < 1:
            raise ValueError(
                f"Plan: matrices has shape {list(matrices.shape)}, expected [K, R, R + 1 + J]"
            )
        steps, registers, columns = matrices.shape
        if registers > _MAX_REGISTERS:
            raise ValueError(f"Plan: {registers} registers, expected at most {_MAX_REGISTERS}")
        shapes = {
            "matrices": matrices.shape,
            "timesteps": (steps,),
            "input_scales": (steps,),
            "draws": (steps,),
            "errors": (steps, columns),
            "log_snr": (steps,),
            "data_maps": (steps, registers + 1),
        }
        if self.draws is None:
            draws = (matrices[:, :, registers + 1 :] != 0).any(axis=1)
            counts = [int(np.flatnonzero(row).max(initial=-1)) + 1 for row in draws]
            object.__setattr__(self, "draws", np.array(counts, dtype=np.int64))
        for key in _ARRAYS:
            self._freeze(key, shapes[key])
        for k, count in enumerate(np.asarray(self.draws)):
            if not 0 <= count <= self.noise_columns:
                raise ValueError(
                    f"Plan: draws is {count} at step {k}, expected 0 to {self.noise_columns}"
                )
        if (self.threshold is None) != (self.data_maps is None):
            raise ValueError("Plan: threshold and data_maps go together, expected both or neither")
        object.__setattr__(self, "_digest", self._compute_digest())

    def _freeze(self, key: str, shape: tuple[int, ...]) -> None:
        value = getattr(self, key)
        if value is None:
            return
        dtype = np.int64 if key == "draws" else np.float64
        array = np.array(value, dtype=dtype)
        if array.shape != shape:
            raise ValueError(f"Plan: {key} has shape {list(array.shape)}, expected {list(shape)}")
        if key != "log_snr" and not np.isfinite(array).all():
            step = int(np.argwhere(~np.isfinite(array))[0][0])
            raise ValueError(f"Plan: {key} is not finite at step {step} of {self.name}")
        # over bytes, which nobody can make writeable again
        frozen = np.ndarray(array.shape, array.dtype, buffer=array.tobytes())
        object.__setattr__(self, key, frozen)

    def _compute_digest(self) -> str:
        head = (self.name, self.initial_scale.hex(), self.threshold)
        digest = hashlib.sha256(ascii(head).encode())
        for key in _ARRAYS:
            value = getattr(self, key)
            digest.update(b"-" if value is None else repr(value.shape).encode() + value.tobytes())
        return digest.hexdigest()

    # -- what it is ---------------------------------------------------------------------------

    @property
    def registers(self) -> int:
        """R: latent-sized tensors that a row carries, the latent included."""
        return int(self.matrices.shape[1])

    @property
    def noise_columns(self) -> int:
        """J: the largest number of noise tensors drawn in one step."""
        return int(self.matrices.shape[2]) - self.registers - 1

    @property
    def stochastic(self) -> bool:
        """Whether any noise enters the result."""
        return any((self._drawn(k) != 0).any() for k in range(len(self)))

    def _drawn(self, k: int) -> np.ndarray:  # [R, draws[k]]
        """The columns of the noise that step ``k`` draws."""
        count = int(np.asarray(self.draws)[k])
        return self.matrices[k, :, self.registers + 1 : self.registers + 1 + count]

    @property
    def digest(self) -> str:
        """SHA-256 of the contents, in hexadecimal."""
        return self._digest

    def __len__(self) -> int:
        return int(self.matrices.shape[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __copy__(self) -> Plan:
        return self

    def __deepcopy__(self, memo: object) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, ({f.name: getattr(self, f.name) for f in fields(self) if f.init},)

    def __repr__(self) -> str:
        noise = ", stochastic" if self.stochastic else ""
        times = ""
        if len(self):
            times = f", t {self.timesteps[0]:.6g} -> {self.timesteps[-1]:.6g}"
        return f"<Plan {self.name}: {len(self)} calls, {self.registers} registers{noise}{times}>"

    def describe(self) -> str:
        """The whole program, a line per step, for a person to read."""
        names = ["x"] + [f"r{i}" for i in range(1, self.registers)]
        columns = [*names, "x0" if self.threshold else "u"]
        columns += [f"z{j}" for j in range(self.noise_columns)]
        lines = [repr(self)]
        for k in range(len(self)):
            updates = []
            for i, row in enumerate(self.matrices[k]):
                if not _is_identity(row, i):
                    terms = [f"{c:+.5g} {n}" for c, n in zip(row, columns, strict=True) if c != 0]
                    updates.append(f"{names[i]} = {' '.join(terms) or '0'}")
            lines.append(f"{k:4d}  t={self.timesteps[k]:<10.6g} " + "; ".join(updates))
        return "\n".join(lines)

    # -- what it means ------------------------------------------------------------------------

    def run(
        self,
        model: Model,
        x: Tensor,  # [B, ...]
        noise: Noise | None = None,  # [K, J, B, ...] or noise(k, j) -> [B, ...]
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:  # [B, ...]
        """Runs the plan in plain torch, in the dtype of ``x``: the definition of a plan.

        Args:
            model: ``model(x_in, t) -> u``; ``x_in`` is already scaled, ``t`` is a float.
            x: ``[B, ...]``, the start: unit noise times ``initial_scale`` for a full trajectory.
            noise: Unit normal draws, ``[K, J, B, ...]``, or a function of the step and the draw. It
                is asked for ``j < draws[k]`` only, in order, so that a function that draws from a
                generator replays the stream of the sampler.
            callback: Called with ``(k, x)`` after every step.

        Returns:
            ``[B, ...]``, the latent after the last step.

        Raises:
            ValueError: The plan is stochastic and no noise was given.
        """
        if self.stochastic and noise is None:
            raise ValueError(f"Plan.run: {self.name} is stochastic, expected noise, got None")
        state = [x] + [torch.zeros_like(x) for _ in range(self.registers - 1)]
        for k in range(len(self)):
            u = model(self.input_scales[k] * state[0], float(self.timesteps[k]))
            if self.threshold is not None and self.data_maps is not None:
                u = self.threshold(_combine(self.data_maps[k], [*state, u]))
            count = self._drawn(k).shape[1]
            draws = [] if noise is None else [_draw(noise, k, j) for j in range(count)]
            state = [_combine(row, [*state, u, *draws]) for row in self.matrices[k]]
            if callback is not None:
                callback(k, state[0])
        return state[0]

    def hold(self, first: int, last: int) -> Plan:
        """Steps ``first .. last - 1`` as one step, with the model output of ``first`` held.

        It is at once a run of skipped calls (AdaptiveDiffusion reuses the last prediction) and
        the coarse solver of SRDS, on all registers: M_{last-1} ... M_first with the column of
        ``u`` accumulated. It draws what the steps draw, ``sum(draws[first:last])``, and its noise
        columns come in that order: step by step, and within step ``k`` by ``j < draws[k]``.

        Raises:
            ValueError: The range is empty or outside the plan, or the plan has a threshold.
        """
        if not 0 <= first < last <= len(self):
            raise ValueError(
                f"Plan.hold: steps {first}:{last} asked of a plan of {len(self)}, "
                "expected 0 <= first < last <= steps"
            )
        if self.threshold is not None:
            raise ValueError("Plan.hold: thresholding is not linear, expected a plan without it")
        R, drawn = self.registers, int(np.asarray(self.draws)[first:last].sum())
        total = np.eye(R, R + 1 + drawn)
        column = R + 1
        for k in range(first, last):
            step, noise = self.matrices[k], self._drawn(k)
            total = step[:, :R] @ total
            total[:, R] += step[:, R]
            total[:, column : column + noise.shape[1]] += noise
            column += noise.shape[1]
        return replace(
            self,
            name=f"{self.name} hold[{first}:{last}]",
            matrices=total[None],
            draws=np.array([drawn]),
            errors=None,
            timesteps=self.timesteps[first : first + 1],
            input_scales=self.input_scales[first : first + 1],
            log_snr=None if self.log_snr is None else self.log_snr[first : first + 1],
        )

    def __getitem__(self, steps: slice) -> Plan:
        """A run of consecutive steps as a plan of its own (same registers, same columns)."""
        if not isinstance(steps, slice) or steps.step not in (None, 1):
            raise ValueError(f"Plan: expected a slice of consecutive steps, got {steps!r}")
        first, last, _ = steps.indices(len(self))
        arrays = {k: v[steps] for k in _ARRAYS if (v := getattr(self, k)) is not None}
        return replace(self, name=f"{self.name}[{first}:{last}]", **arrays)

    # -- what the fused step reads ------------------------------------------------------------

    def table(self, device: torch.device | str = "cpu") -> Tensor:  # [K, (R + 1) * (R + 2) + 1]
        """The coefficient table of `sidestep.kernels.solver_step`, float32.

        Row ``k`` holds the R rows of ``matrices[k]`` and the error functional, columns
        ``[registers; u; z]``, then the input scale of the next call (1 after the last).

        Raises:
            ValueError: The plan has a threshold, or one step uses two noise draws.
        """
        if self.threshold is not None:
            raise ValueError(f"Plan.table: {self.name} has a threshold, use Plan.run")
        R, K = self.registers, len(self)
        errors = np.zeros((K, self.matrices.shape[2])) if self.errors is None else self.errors
        rows = np.concatenate([self.matrices, errors[:, None]], axis=1)
        table = np.ones((K, (R + 1) * (R + 2) + 1))
        for k in range(K):
            noise = rows[k, :, R + 1 :]
            used = self.used_draw(k)
            column = noise[:, used] if used is not None else np.zeros(R + 1)
            table[k, :-1] = np.column_stack([rows[k, :, : R + 1], column]).ravel()
        table[:-1, -1] = self.input_scales[1:]
        return torch.tensor(table, dtype=torch.float32, device=device)

    def used_draw(self, k: int) -> int | None:
        """Which of the noise draws of step ``k`` enters the result, or None.

        Raises:
            ValueError: More than one does.
        """
        used = np.flatnonzero((self._drawn(k) != 0).any(axis=0))
        if len(used) > 1:
            raise ValueError(f"Plan: step {k} of {self.name} uses {len(used)} draws, expected 1")
        return int(used[0]) if len(used) else None

    # -- one small file -----------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes the plan as one safetensors file (float64 tables, text metadata)."""
        from sidestep.runtime.plan_file import save

        save(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Reads a plan that `save` wrote.

        Raises:
            ValueError: The file is not a plan, or its digest does not match its contents.
        """
        from sidestep.runtime.plan_file import load

        return load(Path(path))

    @staticmethod
    def from_scheduler(
        scheduler: object,
        num_inference_steps: int,
        *,
        set_timesteps: Mapping[str, Any] | None = None,
        step: Mapping[str, Any] | None = None,
        method: str = "step",
        begin_index: int = 0,
    ) -> Plan:
        """Compiles any linear diffusers scheduler by probing it.

        The same as `sidestep.runtime.probe.from_scheduler`, which documents the arguments.

        Raises:
            NotLinearError: The scheduler clips, or otherwise is no linear program as configured;
                the message names the setting to change. It is a ValueError.
        """
        from sidestep.runtime.probe import from_scheduler

        return from_scheduler(
            scheduler,
            num_inference_steps,
            set_timesteps=set_timesteps,
            step=step,
            method=method,
            begin_index=begin_index,
        )


def _rebuild(arguments: dict[str, Any]) -> Plan:
    return Plan(**arguments)


def _is_identity(row: np.ndarray, i: int) -> bool:
    return row[i] == 1 and np.count_nonzero(row) == 1


def _combine(row: np.ndarray, values: Sequence[Tensor]) -> Tensor:
    """sum_j row[j] * values[j]; a zero coefficient reads nothing, so NaN does not spread."""
    total = None
    for coefficient, value in zip(row.tolist(), values, strict=False):
        if coefficient != 0:
            term = coefficient * value
            total = term if total is None else total + term
    return torch.zeros_like(values[0]) if total is None else total


def _draw(noise: Noise, k: int, j: int) -> Tensor:
    return noise(k, j) if callable(noise) else noise[k, j]
