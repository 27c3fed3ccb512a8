"""The fused step for a loop: what stays the same from step to step is checked once."""

from __future__ import annotations

import torch
from torch import Tensor

from sidestep.kernels import checks, config
from sidestep.kernels.operators import is_watched, solver_step

_CODES = checks.MODEL_DTYPES


class PreparedStep:
    """`solver_step` with its state bound; a call checks the model's output and nothing else.

    The tensors are held, read and written in place: advance ``step`` with ``step.add_(1)``, write
    new latents into ``registers``. They must not be resized. On the CPU a call costs a third of
    `solver_step`'s overhead; elsewhere, and wherever a compiler or profiler watches, it is
    `solver_step`.

    Attributes:
        registers: ``[slots, R, D]`` fp32.
        weights: ``[rows, G]`` fp32, guidance weights.
        table: ``[K, (R + 1) * (R + 2) + 1]`` fp32.
        step: ``[rows]`` int64.
        slot: ``[rows]`` int64, or None.
        stats: ``[rows, 2]`` fp32.
    """

    def __init__(
        self,
        registers: Tensor,  # [slots, R, D] fp32, written
        weights: Tensor,  # [rows, G] fp32
        table: Tensor,  # [K, (R+1)*(R+2)+1] fp32
        step: Tensor,  # [rows] int64
        slot: Tensor | None,  # [rows] int64
        stats: Tensor,  # [rows, 2] fp32, written
    ) -> None:
        """Checks what is bound.

        Raises:
            ValueError: A shape, device or layout is wrong.
            TypeError: A dtype is wrong.
        """
        if weights.dim() != 2:
            raise ValueError(
                f"PreparedStep: weights has shape {list(weights.shape)}, expected [rows, G]"
            )
        rows, branches = weights.shape
        size = registers.shape[-1] if registers.dim() else 0
        output = torch.empty(rows, size, dtype=torch.float32, device=registers.device)
        checks.solver_step(
            registers, [output] * branches, weights, None, table, step, slot, None, stats
        )
        self.registers, self.weights, self.table = registers, weights, table
        self.step, self.slot, self.stats = step, slot, stats
        self._branches, self._rows, self._size = branches, rows, size
        self._count = branches * rows * size
        self._fast = registers.is_cpu and config.backend() in ("auto", "native")

    def __call__(
        self,
        output: Tensor,  # [G * rows, ...] model dtype, as the model returned it
        noise: Tensor | None = None,  # [rows, ...] fp32
        model_input: Tensor | None = None,  # [G * rows, ...] the dtype of output, written
    ) -> None:
        """Takes one step.

        Args:
            output: All branches in one tensor, branch after branch, D elements a row.
            noise: Unit noise, or None.
            model_input: Receives the next model input of every branch, or None.

        Raises:
            ValueError: A shape, device or layout is wrong, or tensors overlap.
            TypeError: A dtype is wrong.
        """
        if not self._fast or is_watched(output) or not self._fits(output, noise, model_input):
            self._call_operator(output, noise, model_input)
            return
        from sidestep import _native

        first, row_bytes = output.data_ptr(), self._rows * self._size * output.element_size()
        registers, slot = self.registers, self.slot
        _native.solver_step(
            registers.data_ptr(), registers.shape[0], registers.shape[1], self._size,
            tuple([first + g * row_bytes for g in range(self._branches)]), _CODES[output.dtype],
            self.weights.data_ptr(), 0 if noise is None else noise.data_ptr(),
            self.table.data_ptr(), self.table.shape[0], self.step.data_ptr(),
            0 if slot is None else slot.data_ptr(), self._rows,
            0 if model_input is None else model_input.data_ptr(), self.stats.data_ptr(),
        )  # fmt: skip

    def _fits(self, output: Tensor, noise: Tensor | None, model_input: Tensor | None) -> bool:
        """Whether the operator's own checks would pass."""
        if not (output.numel() == self._count and output.dtype in _CODES and output.is_cpu):
            return False
        if not output.is_contiguous():
            return False
        if noise is not None and not (
            noise.numel() * self._branches == self._count
            and noise.dtype is torch.float32
            and noise.is_cpu
            and noise.is_contiguous()
        ):
            return False
        return model_input is None or (
            model_input.numel() == self._count
            and model_input.dtype is output.dtype
            and model_input.is_cpu
            and model_input.is_contiguous()
        )

    def _call_operator(
        self, output: Tensor, noise: Tensor | None, model_input: Tensor | None
    ) -> None:
        """The same by the operator, which also says what is wrong with the arguments."""
        shape = (self._branches, self._rows, self._size)
        for name, tensor, count in (
            ("output", output, self._count),
            ("noise", noise, self._rows * self._size),
            ("model_input", model_input, self._count),
        ):
            if tensor is not None and tensor.numel() != count:
                raise ValueError(
                    f"solver_step: {name} has shape {list(tensor.shape)}, expected {count} elements"
                )
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(
                    f"solver_step: {name} has strides {list(tensor.stride())}, "
                    "expected a contiguous tensor"
                )
        solver_step(
            self.registers, output.view(shape).unbind(0), self.weights,
            None if noise is None else noise.view(shape[1:]), self.table, self.step, self.slot,
            None if model_input is None else model_input.view(shape), self.stats,
        )  # fmt: skip
