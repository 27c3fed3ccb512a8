"""``sidestep bench step``: the document it returns, and that it refuses to time wrong results."""

from __future__ import annotations

from typing import Any

import pytest
from solver_step_cases import Arguments

from sidestep.bench import step as suite
from sidestep.kernels import reference


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a run takes no time."""
    monkeypatch.setattr(suite, "SIZES", (suite.Size("tiny", (2, 4, 8, 8)),))
    monkeypatch.setattr(suite, "COPY_BYTES", 2**14)


def test_document(capsys: pytest.CaptureFixture[str]) -> None:
    document = suite.run(repeats=1)
    assert document["command"] == "bench step"
    (result,) = document["results"]
    assert result["size"] == "tiny" and result["shape"] == [2, 4, 8, 8]
    assert result["speedup"] == result["diffusers_us"] / result["sidestep_us"]
    assert document["speedup_sd"] == result["speedup"]
    rates = document["bandwidth"]
    assert document["bandwidth_fraction"] == rates["fraction"] > 0
    assert document["environment"]["kernels"] == "native"
    suite.print_report(document)
    assert "tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoiled", "sentence"),
    [
        ("registers", "tiny, step 0: registers differ from the reference's; no numbers reported"),
        ("stats", "tiny, step 0: stats differ from the reference's; no numbers reported"),
    ],
)
def test_refuses_to_time_wrong_results(
    monkeypatch: pytest.MonkeyPatch, spoiled: str, sentence: str
) -> None:
    exact = reference.solver_step

    def other(*arguments: Any) -> None:
        exact(*arguments)
        getattr(Arguments(*arguments), spoiled)[0].view(-1)[0].add_(1e-3)

    monkeypatch.setattr(reference, "solver_step", other)
    with pytest.raises(RuntimeError) as caught:
        suite.run(repeats=1)
    assert str(caught.value) == f"bench step: {sentence}"


def test_refuses_a_trajectory_that_is_not_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "AGREEMENT", 1e-12)
    with pytest.raises(
        RuntimeError, match=r"tiny, step 25: the latent is \S+ away from diffusers'"
    ):
        suite.run(repeats=1)
