"""The rules by which rows leave, by the name of their mode."""

from __future__ import annotations

from sidestep.runtime.exits.rules.adadiff import AdaDiff
from sidestep.runtime.exits.rules.sample import PerSample
from sidestep.runtime.exits.rules.static import Static

RULES: dict[str, type[Static] | type[PerSample] | type[AdaDiff]] = {
    "static": Static,
    "sample": PerSample,
    "adadiff": AdaDiff,
}
