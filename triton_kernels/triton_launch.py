"""What the Triton backend needs to launch anything: its version, and where the tensors are."""

from __future__ import annotations

import triton
from torch import Tensor

from sidestep.kernels.errors import BackendUnavailable


def check_version(operation: str) -> None:
    """Refuses a Triton that is too old.

    Raises:
        BackendUnavailable: It is.
    """
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):
        raise BackendUnavailable(
            f"{operation}: the Triton backend needs Triton 3.4 (PyTorch 2.8) or newer, found "
            f"{triton.__version__}; SIDESTEP_KERNELS=reference runs without it"
        )


def check_device(operation: str, name: str, tensor: Tensor, kernel: object) -> None:
    """Refuses a tensor that is not on a GPU, except under Triton's interpreter.

    Raises:
        BackendUnavailable: The kernel is compiled and the tensor elsewhere.
    """
    if not tensor.is_cuda and isinstance(kernel, triton.JITFunction):
        raise BackendUnavailable(
            f"{operation}: the Triton backend needs a CUDA tensor, {name} is on "
            f"{tensor.device}; TRITON_INTERPRET=1 runs it on the CPU"
        )
