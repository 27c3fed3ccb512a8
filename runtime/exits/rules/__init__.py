"""The rules by which rows leave, by the name of their mode; one formula a file."""

from __future__ import annotations

from typing import Protocol

from sidestep.runtime.exits.file import Exits
from sidestep.runtime.exits.leaving import Rule
from sidestep.runtime.exits.rules.adadiff import AdaDiff
from sidestep.runtime.exits.rules.sample import PerSample
from sidestep.runtime.exits.rules.static import Static


class Mode(Protocol):
    """What a class in `RULES` is: a rule made from a file's exits and a threshold.

    Attributes:
        KIND: The kind of exits file that it reads, ``"excess"`` or ``"faithful"``.
        THRESHOLD: Its own threshold, where none is given; 0 or more. At 0 nobody leaves.
    """

    @property
    def KIND(self) -> str: ...
    @property
    def THRESHOLD(self) -> float: ...
    def __call__(
        self,
        exits: Exits,
        threshold: float,
        *,
        batch_mean: bool,
        branches_apart: bool,
        reuse: object,
    ) -> Rule: ...


RULES: dict[str, Mode] = {"static": Static, "sample": PerSample, "adadiff": AdaDiff}
