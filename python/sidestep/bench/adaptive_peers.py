"""DeepCache (Ma et al., CVPR 2024) in ``sidestep bench adaptive``: its own package, if it is there.

It calls the model at every step, but between its full calls only the outermost blocks run and the
rest is reused. Its calls are therefore counted in floating-point operations:

    calls = full calls + other calls * (operations of such a call / operations of a full one)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

MISSING = "deepcache: the package DeepCache is missing (pip install sidestep[peers]), left out"


def available() -> bool:
    """Whether the package can be imported."""
    try:
        import DeepCache  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def deepcache(pipe: Any, interval: int) -> Iterator[None]:
    """``pipe`` with DeepCache, as its README switches it on: branch 0, uniform."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def deepcache_calls(pipe: Any, steps: int, interval: int) -> float:
    """Full calls that the work of ``steps`` steps amounts to."""
    one = _operations(pipe, 1)
    full = _operations(pipe, 2) - one
    with deepcache(pipe, 2):
        cached = _operations(pipe, 2) - one
    whole = -(-steps // interval)
    return whole + (steps - whole) * cached / full


def _operations(pipe: Any, steps: int) -> int:
    with FlopCounterMode(display=False) as counter:
        pipe("", num_inference_steps=steps, guidance_scale=7.5, output_type="latent")
    return int(counter.get_total_flops())
