"""Attaching to one object by giving it a subclass of its own class, and detaching again.

Nothing is written into the object: ``vars`` stay as they are, ``isinstance``, signatures and the
class name in saved configurations too, and a method that is looked up on the class (``__call__``
of a model above all) is outermost whatever hooks come and go on the instance. This is what torch's
``fully_shard`` does to modules as well. Facts: adaptive_diffusion.md, sections 4.2 and 4.3.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

_OWNER = "_sidestep_owner"
_PLAIN = "_sidestep_plain_class"


def swap(
    obj: Any,
    owner: Any,
    overrides: Mapping[str, Callable[..., Any]],
    *,
    copies_follow: bool = False,
) -> None:
    """Gives ``obj`` a subclass with ``overrides``; `restore` takes it away.

    Args:
        obj: Any object whose class is an ordinary one.
        owner: Who asks; `owner_of` returns it.
        overrides: Methods by name. They reach the overridden ones through the class they were made
            for, as ``plain.name(obj, ...)``.
        copies_follow: Copies of ``obj`` keep the overrides. Otherwise they are plain; what is
            pickled always is.
    """
    plain: Any = type(obj)

    def reduce_as_plain(self: Any, _protocol: Any) -> Any:
        # Protocol 2 and above name the class in a way that pickle compares with the object's own.
        function, arguments, *rest = plain.__reduce_ex__(self, 1)
        arguments = tuple(plain if part is swapped else part for part in arguments)
        return plain if function is swapped else function, arguments, *rest

    def shallow(self: Any) -> Any:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def deep(self: Any, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    body: dict[str, Any] = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce_ex__": reduce_as_plain,
        _OWNER: owner,
        _PLAIN: plain,
    }
    if copies_follow:
        body |= {"__copy__": shallow, "__deepcopy__": deep}
    for name, function in overrides.items():
        overridden = getattr(plain, name, None)
        body[name] = functools.wraps(overridden)(function) if overridden else function
    swapped = types.new_class(plain.__name__, (plain,), exec_body=lambda names: names.update(body))
    object.__setattr__(obj, "__class__", swapped)


def owner_of(obj: Any) -> Any:
    """The owner of the subclass that ``obj`` was given, or None."""
    return getattr(type(obj), _OWNER, None)


def restore(obj: Any) -> None:
    """Gives ``obj`` its own class back, unless it has none of ours or another one on top of it."""
    if _OWNER in vars(type(obj)):
        object.__setattr__(obj, "__class__", vars(type(obj))[_PLAIN])
