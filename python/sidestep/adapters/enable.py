"""`enable`: a method on an unmodified diffusers pipeline, and off again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sidestep.adapters.attach import Part, blocks_of, is_compiled, overrides_of, parts_of
from sidestep.adapters.calibrated import (
    course_of_call,
    refuse_other_pipeline,
    warn_of_other_course,
)
from sidestep.adapters.refusals import refuse_unsuitable
from sidestep.adapters.swap import owner_of, restore, swap
from sidestep.adapters.trajectory import OnStep, WholeTrajectory
from sidestep.runtime.calibration import Calibration
from sidestep.runtime.exits.draft import Drafting
from sidestep.runtime.exits.flight import Passage
from sidestep.runtime.exits.layouts import Layout, layout_of
from sidestep.runtime.exits.leaving import Leaving, Ways
from sidestep.runtime.methods.adaptive import Adaptive
from sidestep.runtime.methods.criterion import Method
from sidestep.runtime.methods.early_exit import EarlyExit
from sidestep.runtime.methods.srds import SRDS
from sidestep.runtime.stepwise import Stepwise
from sidestep.runtime.summary import Summary

if TYPE_CHECKING:
    from types import TracebackType

    from diffusers import DiffusionPipeline

    from sidestep.runtime.ranks import Ranks

__all__ = ["Handle", "Summary", "disable", "enable"]


def enable(
    pipe: DiffusionPipeline,
    method: Method | SRDS | Literal["auto"] | None = None,
    *,
    driver: str | None = None,
    on_step: OnStep | None = None,
    ranks: Ranks | None = None,
    graphs: str = "auto",
) -> Handle:
    """Runs ``pipe`` with a method from now on.

        with sidestep.enable(pipe, sidestep.Adaptive(threshold=0.01)) as handle:
            images = pipe("frog on a bicycle").images
        print(handle.summary())

    Args:
        pipe: A pipeline with a ``unet`` or ``transformer`` and a ``scheduler`` that suits the
            method (docs/pipelines.md).
        method: Its settings. None is the default `Adaptive` for the stepwise driver, and every
            model call for the other one. ``"auto"`` is `SRDS` or every call: the first generation
            takes some seconds more to measure what is quicker here, and the summary says it.
        driver: ``"stepwise"``, the pipeline's own loop; or ``"whole"``, the whole trajectory in the
            engine (docs/whole-trajectory.md). None is ``"whole"`` for `SRDS` and ``"auto"``, which
            need it, and else ``"stepwise"``.
        on_step: For ``"whole"``: called ``on_step(k, x, rows)`` with the latents of the rows that
            have taken step ``k``; with `SRDS`, the present estimate of the finished latents of the
            rows that are in iterate ``k``.
        ranks: For `SRDS`: the processes of a job, each with the same pipeline, which make every
            picture together (docs/srds.md). Every one calls `enable`, and the pipeline with the
            same arguments, a generator with the same seed among them; every one gets the pictures.
            With ``driver="whole"`` and no method too, where they share the guidance branches only.
        graphs: For ``"whole"`` on a CUDA device: ``"auto"`` captures the model calls and their
            steps in CUDA graphs where it can, and the summary says why where it cannot; ``"on"``
            raises there; ``"off"`` captures nothing.

    Returns:
        The handle that turns it off, also as a context manager, and that has the summary.

    Raises:
        ValueError: The pipeline is enabled already, shares its model with one that is, has a
            scheduler under which the method means nothing, or is not the one that the method was
            calibrated on; or ``ranks`` cannot share the method.
        TypeError: ``method`` is not the settings of a method, or ``ranks`` are none.
    """
    parallel = isinstance(method, SRDS) or method == "auto"
    driver = driver or ("whole" if parallel else "stepwise")
    _check_driver(driver, method, on_step, graphs)
    if method is None and driver == "stepwise":
        method = Adaptive()
    known = method is None or method == "auto" or isinstance(method, Method | SRDS)
    if isinstance(method, type) or not known:
        raise TypeError(
            f"enable: method is {method!r}, expected settings such as sidestep.Adaptive(...) or "
            "sidestep.SRDS(...), or 'auto'"
        )
    if ranks is not None:
        _check_ranks(ranks, method)
    handle = Handle(pipe, method, driver, on_step, ranks, graphs)
    handle._attach()
    return handle


def disable(pipe: DiffusionPipeline) -> None:
    """Leaves ``pipe`` as `enable` found it.

    Raises:
        ValueError: The pipeline is not enabled.
    """
    handle = owner_of(pipe)
    if handle is None:
        raise ValueError("disable: this pipeline is not enabled")
    handle.disable()


class Handle:
    """A method that is on; `enable` makes it.

    Attributes:
        method: The settings, or ``"auto"``.
        active: False once it was disabled.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        method: Method | SRDS | Literal["auto"] | None,
        driver: str = "stepwise",
        on_step: OnStep | None = None,
        ranks: Ranks | None = None,
        graphs: str = "auto",
    ) -> None:
        """Prepares; nothing is touched yet."""
        self.method = method
        self.active = False
        self._pipe: Any = pipe
        parts_of(pipe)  # refuses what has none
        self._driver: Stepwise | WholeTrajectory
        if isinstance(method, str):
            from sidestep.adapters.trajectory_auto import Deciding

            self._driver = Deciding(on_step, graphs)
        elif driver == "whole" or method is None or isinstance(method, SRDS):
            exits = method.exits if isinstance(method, SRDS) else None
            drafting = None if exits is None else _drafting(pipe, exits)
            self._driver = WholeTrajectory(method, on_step, ranks, graphs, drafting)
        else:
            leaving = _leaving(pipe, method) if isinstance(method, EarlyExit) else None
            criterion = method.criterion()
            if isinstance(method, EarlyExit):
                criterion = method.criterion(leaving)
            self._driver = Stepwise(criterion, method=repr(method), leaving=leaving)
        path = getattr(method, "calibration", None)
        self._calibration = None if path is None else Calibration.load(path)
        self._attached: list[Any] = []
        self._compiled: set[str] = set()  # parts that are
        self._calling = False  # within the pipeline's own call
        self._branch: str | None = None  # the guidance branch, where the pipeline says it
        self._timestep: Any = None  # of the last step
        self._copies = 1  # of every latent in the scheduler's batch

    @property
    def passage(self) -> Passage | None:
        """What the blocks of the model go through now."""
        ways = self._ways
        return None if ways is None or not self.active else ways.passage

    @property
    def _ways(self) -> Ways | None:
        driver = self._driver
        return driver.leaving if isinstance(driver, Stepwise) else driver.drafting

    @property
    def _measures(self) -> bool:
        """Whether the method decides by how fast the picture changes."""
        if isinstance(self.method, EarlyExit):
            return isinstance(self.method.reuse, Adaptive)
        return isinstance(self.method, Method)

    def disable(self) -> None:
        """Leaves the pipeline as `enable` found it. Once is enough, more does no harm."""
        self.active = False
        for obj in self._attached:
            restore(obj)
        self._attached.clear()
        self._driver.release()
        if isinstance(self._driver, WholeTrajectory):
            self._driver.graphs.forget()

    def summary(self) -> Summary:
        """Model calls per image, the skip map and the reasons of the last generation."""
        return self._driver.summary()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.disable()

    def _attach(self) -> None:
        """Attaches to what the pipeline holds now, and lets go of what it no longer holds."""
        wanted = parts_of(self._pipe)
        if self._ways is not None:
            wanted = self._with_blocks(self._ways, wanted)
        new: list[tuple[Part, Any]] = [pair for pair in wanted if not self._has(pair[1])]
        for part, obj in wanted:
            if getattr(obj, "is_cache_enabled", False):
                raise ValueError(
                    f"enable: the {part.name} has a cache of diffusers enabled, which counts on "
                    "the same batch at every step; call its disable_cache first"
                )
        for _, obj in new:
            _refuse_owned(obj)
        if self._measures and not self._has(self._pipe.scheduler):
            refuse_unsuitable(self._pipe.scheduler)
        if self._calibration is not None and any(part.role != "pipeline" for part, _ in new):
            refuse_other_pipeline(self._pipe, self._calibration)
        for obj in self._attached:
            if not any(obj is kept for _, kept in wanted):
                restore(obj)
        self._attached = [obj for _, obj in wanted]
        for part, obj in new:
            restore(obj)  # a copy of an attached object carries the class of another handle
            follow = part.role == "scheduler"
            swap(obj, self, overrides_of(self, part, type(obj)), copies_follow=follow)
        self._compiled = {p.name for p, obj in wanted if p.role != "block" and is_compiled(obj)}
        self._branch, self._timestep = None, None
        self.active = True

    def _with_blocks(self, ways: Ways, parts: list[tuple[Part, Any]]) -> list[tuple[Part, Any]]:
        """The blocks of the model too; raises ValueError for a model that its rows cannot leave."""
        models = [obj for part, obj in parts if part.role == "model"]
        if len(models) > 1:
            raise ValueError(
                f"enable: {type(self._pipe).__name__} has {len(models)} denoisers, and the exits "
                "of one are not those of another"
            )
        model = models[0]
        if not self._has(model):
            if is_compiled(model):
                raise ValueError(
                    f"enable: {type(model).__name__} is compiled, and every size that its batch "
                    "shrinks to would be compiled anew; EarlyExit needs it as it was"
                )
            ways.exits.check_model(model)
        return [*parts, *blocks_of(model, ways.layout)]

    def _has(self, obj: Any) -> bool:
        return any(obj is attached for attached in self._attached)

    def _begin(self) -> None:
        """A generation begins, with whatever model and scheduler the pipeline has by now."""
        self._attach()
        self._driver.begin()

    def _check_course(self, scheduler: Any) -> None:
        """Warns where the generation that begins is not what was calibrated for."""
        if self._calibration is not None:
            known = course_of_call(self._pipe, scheduler, self._calling)
            warn_of_other_course(self._calibration, *known)


def _leaving(pipe: Any, method: EarlyExit) -> Leaving:
    """The state of early exits; raises ValueError for a class that they are not known for."""
    return method.leaving(method.file(), _layout(pipe))


def _drafting(pipe: Any, exits: EarlyExit) -> Drafting:
    """The state of SRDS's early exits; raises ValueError as `_leaving`."""
    assert exits.threshold is not None
    return Drafting(exits.file(), _layout(pipe), exits.threshold)


def _layout(pipe: Any) -> Layout:
    models = [obj for part, obj in parts_of(pipe) if part.role == "model"]
    return layout_of(models[0])


def _refuse_owned(obj: Any) -> None:
    """Raises ValueError if another handle, or this one through another pipeline, holds ``obj``."""
    other = owner_of(obj)
    if other is not None and other.active and other._has(obj):
        raise ValueError(
            f"enable: {type(obj).__name__} is enabled already; disable it first "
            "(a pipeline that shares its model or scheduler counts)"
        )


def _check_driver(driver: str, method: Any, on_step: OnStep | None, graphs: str) -> None:
    """Raises ValueError unless the driver can run the method, and knows of the other settings."""
    if driver not in ("stepwise", "whole"):
        raise ValueError(f"enable: driver is {driver!r}, expected 'stepwise' or 'whole'")
    if driver == "whole":
        if isinstance(method, EarlyExit):
            raise ValueError(
                "enable: EarlyExit leaves within model calls, expected driver='stepwise'"
            )
        return
    if isinstance(method, SRDS) or method == "auto":
        raise ValueError("enable: SRDS runs many steps at once, expected driver='whole'")
    if on_step is not None:
        raise ValueError(
            "enable: on_step belongs to driver='whole', use the pipeline's own callback_on_step_end"
        )
    if graphs != "auto":
        raise ValueError(f"enable: graphs={graphs!r} belongs to driver='whole'")


def _check_ranks(ranks: Any, method: Method | SRDS | Literal["auto"] | None) -> None:
    """Raises TypeError or ValueError unless ``ranks`` can run the method together."""
    from sidestep.runtime.ranks import Ranks

    if not isinstance(ranks, Ranks):
        raise TypeError(f"enable: ranks is {ranks!r}, expected sidestep.Ranks(...)")
    if not (isinstance(method, SRDS) or (method is None and ranks.size == ranks.team)):
        raise ValueError(
            f"enable: ranks share the blocks of SRDS, expected method=sidestep.SRDS(...), got "
            f"{method!r}"
        )
    if isinstance(method, SRDS) and method.exits is not None:
        raise ValueError("enable: ranks make whole model calls, expected SRDS without exits")
