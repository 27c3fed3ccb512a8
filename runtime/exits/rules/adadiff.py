"""AdaDiff's rule: leave after the first block that is certain enough.

    u_i = mean over tokens of sigmoid(w_i . L_i + v_i . tau + b_i) < threshold

(Tang et al., Sec. 3.2; L_i is the output of block i, tau embeds the time.) Each row decides, by the
mean over its guidance branches. The released code differs in two ways, which are switches: the mean
over the whole batch decides for all of it, and the branches decide apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidestep.runtime.exits.file import Exits
from sidestep.runtime.exits.leaving import Rule, Sight, on
from sidestep.runtime.methods.criterion import Course
from sidestep.runtime.upload import upload


class AdaDiff(Rule):
    """A threshold on the uncertainty after every block."""

    KIND = "faithful"
    THRESHOLD = 0.08  # 1 - 0.92 of the released code's confidence

    def __init__(
        self,
        exits: Exits,
        threshold: float,
        *,
        batch_mean: bool,
        branches_apart: bool,
        **_others: object,
    ) -> None:
        """No trajectory runs yet."""
        self._probes = exits.probes
        self._threshold = threshold
        self._batch_mean = batch_mean
        self.joint = not branches_apart
        self.start(Course())

    def start(self, course: Course) -> None:
        """Takes the steps' lambda, which is the time here; without it nobody leaves."""
        self._course = course
        self._snr: Tensor | None = None

    def resume(self, course: Course, steps: int) -> None:
        """Takes the lambda of the steps that are left."""
        self.start(course)

    def leave(self, sight: Sight) -> Sequence[bool] | None:
        """Rows that are certain."""
        known = self._course.log_snr
        if known is None or sight.step >= len(known) or self._threshold == 0:
            return None
        device = sight.hidden.device
        self._probes = on(device, self._probes)
        if self._snr is None or self._snr.device != device:
            self._snr = upload(list(known), torch.float32, device)
        scores = self._probes(
            sight.exit, sight.hidden, self._snr[sight.step], normalise=False
        )  # [n, P]
        decided = self._together(scores.mean(1), sight)
        return None if decided is None else (decided < self._threshold).tolist()

    def _together(self, u: Tensor, sight: Sight) -> Tensor | None:  # [n] -> [n]
        """The uncertainty that decides for each row; None where its branches are not known."""
        if self._batch_mean and (self.joint or sight.pairs is None):
            return u.mean().expand(len(u))
        if not self._batch_mean and not self.joint:
            return u
        if sight.pairs is None:
            return None
        branches, rows = sight.pairs
        by_branch = u.view(branches, len(rows))
        if self._batch_mean:
            return by_branch.mean(1, keepdim=True).expand_as(by_branch).flatten()
        return by_branch.mean(0).repeat(branches)
