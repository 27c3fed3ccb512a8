"""`enable` and torch.compile: one graph, however many rows leave the batch."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from tiny_cases import CASES, run
from tiny_methods import ByRow, marks
from tiny_pipelines import generate
from torch import Tensor, nn

from sidestep.adapters.attach import is_compiled
from sidestep.adapters.enable import enable


class Net(nn.Module):
    """A network small enough to be compiled in a test."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.config, self.dtype, self.device = unet.config, torch.float32, torch.device("cpu")
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, sample: Tensor, t: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.tanh(sample) * self.scale,)


def test_rows_that_leave_the_batch_compile_nothing_new(sd: StableDiffusionPipeline) -> None:
    """A compiled model sees only the batch sizes that the host itself has given it."""
    graphs, sizes = [], []

    def backend(graph: Any, _example: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            sizes.extend(len(a) for a in args if isinstance(a, Tensor) and a.ndim == 4)
            return graph.forward(*args)

        graphs.append(graph)
        return call

    torch._dynamo.reset()
    net = sd.unet = Net(sd.unet)
    with enable(sd, ByRow()) as handle:
        alone = generate(sd, [2], steps=8, guidance_scale=1.0)
        together = generate(sd, [3, 1, 2, 5], steps=8, guidance_scale=1.0)
        assert len(set(marks(handle))) > 1
    sd.unet = torch.compile(net, backend=backend)
    with enable(sd, ByRow()) as handle:
        assert torch.equal(generate(sd, [3, 1, 2, 5], steps=8, guidance_scale=1.0), together)
        called = [sum(row[k] for row in handle.summary().skip_map) for k in range(8)]
        assert any(0 < n < 4 for n in called)
        assert len(graphs) == 1 and set(sizes) == {4}
        assert len(sizes) == sum(n > 0 for n in called)
        # Two sizes of one's own: the smallest that is large enough is used.
        generate(sd, [3, 1], steps=8, guidance_scale=1.0)
        compiled = len(graphs)
        sizes.clear()
        assert torch.equal(generate(sd, [3, 1, 2, 5], steps=8, guidance_scale=1.0), together)
        assert sizes == [4 if n > 2 else 2 for n in called if n]
        assert len(graphs) == compiled
    torch.testing.assert_close(together[2], alone[0])


def test_a_transformer_of_diffusers_stays_one_graph() -> None:
    """Layouts too: a timestep that was expanded over the batch stays so."""
    case = CASES["PixArtSigma"]
    pipe = case.build()
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    graphs = []

    def backend(graph: Any, _example: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    with enable(pipe, ByRow()) as handle:
        run(case, pipe, [3, 1, 2], 6)
        assert len(set(marks(handle))) > 1
    assert len(graphs) == 1


def test_compiled_models_are_recognised() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    plain, whole, in_place, block, forward = (net() for _ in range(5))
    in_place.compile(backend="eager")
    block[0].compile(backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")  # type: ignore[method-assign]
    assert not is_compiled(plain) and not is_compiled(object())
    for model in (torch.compile(whole, backend="eager"), in_place, block, forward):
        assert is_compiled(model)
