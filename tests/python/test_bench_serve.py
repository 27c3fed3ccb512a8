"""`sidestep bench serve` on a few requests: the document, the gate, and the command."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner

from sidestep.bench import serve as suite
from sidestep.cli.bench import app
from sidestep.serving import ImageRequest


def test_the_command() -> None:
    arguments = "serve --clients 3 --requests 5 --steps 2 --steps 3 --repeats 1 --batch 2 --json"
    outcome = CliRunner().invoke(app, arguments.split())
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(outcome.stdout)
    assert document["command"] == "bench serve" and document["settings"]["steps"] == [2, 3]
    rows = {row["way"]: row for row in document["results"]}
    assert list(rows) == [suite.SERIAL, suite.FIXED, suite.SERVICE, "service, adaptive"]
    for row in rows.values():
        rate = 5 / row["seconds"][0]
        assert row["pictures_per_second"] == pytest.approx(rate)
        assert row["speedup"] == pytest.approx(rate / rows[suite.SERIAL]["pictures_per_second"])
        assert 0 < row["latency_median"] <= row["latency_p95"] <= row["seconds"][0]
    for name in (suite.SERIAL, suite.FIXED, suite.SERVICE):
        assert rows[name]["nfe"] == 2.4 and rows[name]["psnr"] is None
    assert rows["service, adaptive"]["nfe"] <= 2.4


def test_fixed_batches_are_of_equal_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []

    def pictures(_pipe: Any, requests: Any) -> list[PIL.Image.Image]:
        made.append([request.seed for request in requests])
        return [PIL.Image.new("RGB", (1, 1)) for _ in requests]

    monkeypatch.setattr(suite, "pictures", pictures)
    plain = suite.Plain(None, 2)
    asked = [ImageRequest(prompt="x", seed=i, steps=2 + i % 2) for i in range(6)]
    futures: list[Future[Any]] = [plain.submit(request) for request in asked]
    with plain:
        assert [future.result(10).statistics.steps for future in futures] == [2, 3] * 3
    assert made == [[0, 2], [1, 3], [4], [5]]


def test_other_pictures_are_not_reported() -> None:
    black, grey = PIL.Image.new("RGB", (2, 2)), PIL.Image.new("RGB", (2, 2), (0, 2, 0))
    ways = [suite.Way(name, lambda: suite.Plain(None, 1)) for name in ("first", "second")]
    ways[0].images, ways[1].images = [black], [black]
    suite.check(ways)
    ways[1].images = [grey]
    with pytest.raises(RuntimeError, match="second: picture 0 is up to 2 of 255 away"):
        suite.check(ways)
    assert suite._quality([grey], [black]) == pytest.approx(10 * math.log10(3 * (255 / 2) ** 2))
    assert suite._quality([black], [black]) is None
