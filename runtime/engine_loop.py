"""The loop around an engine for a model that is called here, with CUDA graphs where there are."""

from __future__ import annotations

import torch

from sidestep.kernels import config
from sidestep.runtime import ranges
from sidestep.runtime.engine import Engine
from sidestep.runtime.graphs import CaptureError, Model, TickGraphs, requested
from sidestep.runtime.graphs_device import CudaGraphs, GraphDevice

_GRAPHS = ("auto", "on", "off")


class EngineLoop:
    """Calls a model for an engine, tick by tick, until nothing needs it any more.

        loop = EngineLoop(engine, lambda x, t, text: unet(x, t, **text).sample)
        loop.run()
        pictures = engine.results()

    With graphs, a tick is one graph launch: the gather of the model's inputs, the model call and
    the solver step.  The first tick of a kind (size of the call, shapes of the conditioning) runs
    as it is, the second is captured; results are the same bits if the model's are.  What is
    captured is what the model did then: it may not look at values of tensors on the host, and what
    it reads beside its arguments has to stay where it is.  After other weights, `forget`.

    One thread drives it; others, and callbacks, may submit and cancel meanwhile.  What the model
    raises ends the requests in that call.

    Attributes:
        engine: Where the requests are.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        *,
        graphs: str = "auto",
        chain: int = 4,
        kept: int = 32,
        device: GraphDevice | None = None,
    ) -> None:
        """Captures nothing yet.

        Args:
            engine: Where the requests are.
            model: ``model(x, t, conditioning)`` of what a `Batch` has returns ``[N, *shape]`` in
                the engine's dtype.
            graphs: "on", "off", or "auto": on where the engine is on a CUDA device.
            chain: With graphs, most steps that are taken in one go while no row needs anything but
                the model; a request that comes meanwhile waits so long. 1 for none.
            kept: Graphs that are kept, at most, the latest ones.
            device: What captures; None for CUDA.

        Raises:
            ValueError: A setting is out of range, or graphs are on where there can be none.
        """
        if graphs not in _GRAPHS:
            raise ValueError(f"EngineLoop: graphs is {graphs!r}, expected 'auto', 'on' or 'off'")
        for name, value in (("chain", chain), ("kept", kept)):
            if value < 1:
                raise ValueError(f"EngineLoop: {name} is {value}, expected 1 or more")
        there = device is not None or engine.device.type == "cuda"
        if graphs == "on" and not there:
            raise ValueError(
                f"EngineLoop: graphs='on' with an engine on {engine.device}, expected one on a "
                "CUDA device; 'auto' runs without graphs elsewhere"
            )
        self.engine, self._model = engine, model
        self._graphs: TickGraphs | None = None
        # the reference reads coefficients on the host, which no graph can
        if graphs == "on" or (graphs == "auto" and there and config.backend() != "reference"):
            device = CudaGraphs(engine.device) if device is None else device
            self._graphs = TickGraphs(device, kept=kept, chain=chain)
            self._prepare = requested(model)

    @property
    def counts(self) -> dict[str, int]:
        """Graphs ``captured`` and ``replayed`` so far, and kinds of ticks ``kept``."""
        graphs = self._graphs
        if graphs is None:
            return {"captured": 0, "replayed": 0, "kept": 0}
        return {"captured": graphs.captured, "replayed": graphs.replayed, "kept": len(graphs)}

    def run(self) -> None:
        """`tick` until nothing needs the model.

        Raises:
            CaptureError: See `tick`.
        """
        while self.tick():
            pass

    def tick(self) -> bool:
        """One model call and what follows from it, or several in one graph.

        Returns:
            False when nothing needs the model now.

        Raises:
            CaptureError: The model cannot be captured. The tick has been taken all the same:
                nothing is lost, and a loop with ``graphs="off"`` can go on.
        """
        if self._graphs is None:
            return self._call()
        graphs, prepare = self._graphs, self._prepare
        went_on = self.engine.tick(lambda tick: graphs.take(tick, prepare))
        failure, graphs.failure = graphs.failure, None
        if failure is not None:
            raise CaptureError(
                f'EngineLoop: {failure}; graphs="off" runs without'
            ) from failure.__cause__
        return went_on

    def forget(self) -> None:
        """Lets go of all graphs: the model has got other weights, or does something else."""
        if self._graphs is not None:
            self._graphs.forget()

    @torch.no_grad()
    def _call(self) -> bool:
        """One model call without a graph."""
        batch = self.engine.next()
        if batch is None:
            return False
        try:
            with ranges.within("model"):
                output = self._model(batch.x, batch.t, batch.conditioning)
            self.engine.complete(batch, output)
        except Exception as error:
            self.engine.fail(batch, error)
        except BaseException as error:
            self.engine.fail(batch, RuntimeError(f"EngineLoop: broken off by {error!r}"))
            raise
        return True
