"""What a captured call of a torch module goes by without looking again, and what forbids capturing.

A replay launches what was launched at the capture.  It reads weights where they were then, and it
goes by every setting that the module's Python had: LoRA scales, attention processors, the training
mode.  `state_of` writes all of that down, to be compared before the next replay; what changes from
call to call shows in it as well.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_VALUES = (bool, int, str, bytes, type(None), torch.dtype, torch.device)
_DEPTH = 4  # of objects within objects
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_STANDARD = frozenset(vars(nn.Module())) - {"training"}

State = dict[str, Hashable]
"""By module and attribute."""


def state_of(model: nn.Module) -> State:
    """Everything of a module that a captured call of it was captured with.

    Weights count by where they are, not by what is in them: a replay reads them there.
    """
    state: State = {}
    for name, module in model.named_modules(remove_duplicate=True):
        for attribute, value in vars(module).items():
            if attribute == "_modules" or (attribute in _STANDARD and not value):
                continue
            state[f"{name}.{attribute}" if name else attribute] = _told(value, _DEPTH)
        state[f"{name} (class)"] = id(type(module))
    return state


def settings() -> State:
    """Of torch itself: which kernels it launches."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    attention = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    return {
        "torch's float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch.backends.cudnn": (cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic),
        "torch.backends.cuda's attention": attention,
    }


def difference(before: State, now: State) -> str | None:
    """The first attribute that is not what it was; None if all are."""
    if before == now:
        return None
    for name in (*now, *before):
        if name not in before or name not in now or before[name] != now[name]:
            return name
    return None


def _told(value: Any, depth: int) -> Hashable:
    """Equal for what the module's Python cannot tell apart."""
    if isinstance(value, _VALUES):
        return (type(value), value)
    if isinstance(value, float | complex):
        return repr(value)  # NaN is itself
    if type(value) in (Tensor, nn.Parameter):
        return (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
    if depth:
        if isinstance(value, Mapping):
            return tuple((_told(k, 1), _told(v, depth - 1)) for k, v in value.items())
        if isinstance(value, list | tuple):
            return (type(value), *(_told(v, depth - 1) for v in value))
        if isinstance(value, set | frozenset):
            return (type(value), frozenset(_told(v, 1) for v in value))
    own = getattr(value, "__dict__", None)
    if not depth or not own or isinstance(value, type | Tensor | nn.Module):
        return (type(value), id(value))
    return (type(value), id(value), *((k, _told(v, depth - 1)) for k, v in own.items()))


def obstacle(model: Any) -> str | None:
    """Why a call of the model should not be replayed; None where nothing speaks against it.

    A replay runs none of the module's Python: hooks and exchanged ``forward`` methods would not be
    called, and what they move, count or keep would be missing.
    """
    if not isinstance(model, nn.Module):
        return f"{type(model).__name__} is no torch.nn.Module, and what it reads is not known"
    for name, module in model.named_modules():
        own, where = vars(module), f"{type(model).__name__}.{name}".rstrip(".")
        if "_hf_hook" in own:
            return f"{where} has a hook of accelerate (offloading), which runs on the host"
        if getattr(own.get("_diffusers_hook"), "hooks", None):
            return f"{where} has hooks of diffusers (offloading, casts), which run on the host"
        if any(own.get(hooks) for hooks in _HOOKS):
            return f"{where} has forward hooks, which run on the host"
        if "forward" in own:
            return f"the forward method of {where} was exchanged, and what it keeps is not known"
    return None
