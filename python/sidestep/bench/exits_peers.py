"""FirstBlockCache of diffusers in ``sidestep bench exits``, on pipelines that do not offer it.

It adds to the first block's output what the other blocks added in the last full call, while the
residual of the first block has changed by less than a threshold, in the mean over the whole batch.
Pipelines of DiT and PixArt give their models no cache context, so that one is set here for every
generation: both guidance branches are in one call, and so in one context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sidestep.runtime.exits.layouts import layout_of


class Blocks:
    """Model calls, and blocks really run, of each generation."""

    def __init__(self) -> None:
        """None yet."""
        self.calls: list[int] = []
        self.run: list[int] = []

    @property
    def depth(self) -> float:
        """Blocks a call in all generations but the first, which warms up."""
        return sum(self.run[1:]) / sum(self.calls[1:])


def reason(model: Any) -> str:
    """Why the cache cannot be had here; empty if it can."""
    try:
        with first_block_cache(model, 0.1):
            return ""
    except (ImportError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def first_block_cache(model: Any, threshold: float) -> Iterator[Blocks]:
    """``model`` with the cache, and what it counts.

    Raises:
        ImportError: This version of diffusers has none, or another interface of it.
        ValueError: It does not know the model's blocks.
    """
    from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
    from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    counted, last = Blocks(), [0.0]

    def before(_model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A time that does not fall begins a generation."""
        time = float(kwargs["timestep"].flatten()[0])
        if not counted.calls or time >= last[0]:
            HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
            _set_cache_context(model, CacheContext("generation"))
            counted.calls.append(0)
            counted.run.append(0)
        last[0] = time
        counted.calls[-1] += 1

    def ran(*_: Any) -> None:
        counted.run[-1] += 1

    blocks = [block for _, block in layout_of(model).of(model)]
    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [_attention(block).register_forward_pre_hook(ran) for block in blocks]
    try:
        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))
        HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
        yield counted
    finally:
        for handle in handles:
            handle.remove()
        registry = HookRegistry.check_if_exists_or_initialize(model)
        for name in (_FBC_LEADER_BLOCK_HOOK, _FBC_BLOCK_HOOK):
            registry.remove_hook(name, recurse=True)
        for part in (model, *blocks):
            if hasattr(part, "_diffusers_hook") and not part._diffusers_hook.hooks:
                del part._diffusers_hook


def _attention(block: nn.Module) -> nn.Module:
    """The part of a block that runs if and only if the block does."""
    return block.get_submodule("attn1" if hasattr(block, "attn1") else "attn")
