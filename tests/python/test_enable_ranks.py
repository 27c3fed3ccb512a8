"""`enable(pipe, SRDS(), ranks=...)`: a pipeline on several processes, as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import enable_ranks_jobs
import pytest
import torch
from enable_ranks_jobs import CASES, build, made
from test_ranks import Told, results, sentence, started
from tiny_pipelines import tiny_sd

from sidestep import SRDS, Adaptive, Ranks, enable
from sidestep.runtime.identity import digest

JOBS = ("blocks:2", "blocks:3", "guidance:2", "guidance:4", "dying:2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("enable_ranks")
    with started(enable_ranks_jobs.__file__, str(path), *JOBS):
        pass
    return path


@pytest.fixture(scope="module")
def alone() -> Told:
    """By case, what one process makes."""
    return {case: in_one(case) for case in CASES}  # type: ignore[return-value]


def in_one(case: str) -> dict[str, Any]:
    method, scheduler, _ = CASES[case]
    pipe = build(scheduler)
    with enable(pipe, method) as handle:
        x = made(pipe, case)
    summary = handle.summary()
    return {"x": x, "iterations": summary.iterations, "errors": summary.errors}


def assert_as_in_one(told: Told, expected: dict[str, Any]) -> None:
    for of_rank in told:
        assert torch.equal(of_rank["x"], expected["x"])
        assert of_rank["iterations"] == expected["iterations"]
        assert of_rank["errors"] == expected["errors"]
        assert "calls of rank" in of_rank["note"]


@pytest.mark.parametrize("job", ["blocks-2", "blocks-3", "guidance-2", "guidance-4"])
def test_every_rank_gets_the_pictures_of_one_process(
    folder: Path, alone: dict[str, Any], job: str
) -> None:
    name, size = job.split("-")
    found = results(folder, name, int(size))
    for case in set(CASES) & set(found):
        assert len(found[case]) == int(size)
        assert_as_in_one(found[case], alone[case])


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("case", "said", "advice"),
    [
        ("other prompts", "was given arguments of the model ", "pass the same prompts"),
        ("other noise", "was given starting latents ", "a generator with the same seed"),
        ("other draws", "was given noise of the steps ", "a generator with the same seed"),
        ("other steps", "was given 11 steps of ", ""),
        ("other images", "was given [4, 4, 8, 8] latents", ""),
    ],
)
def test_ranks_that_were_given_something_else_say_so(
    folder: Path, size: int, case: str, said: str, advice: str
) -> None:
    found = sentence(results(folder, "blocks", size)[case])
    assert f"rank {size - 1} {said}" in found
    assert "expected the same as the rank before" in found
    assert advice in found


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_team_say_so_too(folder: Path, size: int) -> None:
    found = sentence(results(folder, "guidance", size)["other guidance"])
    assert "rank 1 was given arguments of the model " in found
    assert ", guidance (-5." in found and "pass the same prompts and settings" in found


@pytest.mark.parametrize("size", [2, 3])
def test_an_error_of_one_rank_is_raised_on_all_and_the_pipelines_go_on(
    folder: Path, alone: dict[str, Any], size: int
) -> None:
    found = results(folder, "blocks", size)
    assert sentence(found["raised"]) == f"rank {size - 1}: out of paper"
    assert_as_in_one(found["again"], alone["early"])
    expected = made(build(), "early")
    for of_rank in found["plain"]:
        assert torch.equal(of_rank["x"], expected)


def test_guidance_branches_are_shared_without_a_method(folder: Path) -> None:
    pipe = build()
    with enable(pipe, driver="whole"):
        expected = made(pipe, "early")
    for of_rank in results(folder, "guidance", 2)["serial"]:
        assert torch.equal(of_rank["x"], expected)


def test_a_rank_that_dies_ends_the_call_and_the_pipeline_goes_on_without(folder: Path) -> None:
    found = results(folder, "dying", 2)
    (dead,), (plain,) = found["dead"], found["plain"]
    assert "rank 0 got no word from rank 1" in dead["error"] or "cannot reach" in dead["error"]
    assert dead["seconds"] < 10
    assert torch.equal(plain["x"], made(build(), "early"))


def test_what_is_no_srds_is_refused() -> None:
    ranks = Ranks.__new__(Ranks)  # a process group is not needed for a refusal
    ranks.size, ranks.team = 2, 1
    for method, driver in ((Adaptive(), None), (None, None), (None, "whole")):
        with pytest.raises(ValueError, match="ranks share the blocks of SRDS, expected method="):
            enable(tiny_sd(), method, driver=driver, ranks=ranks)
    with pytest.raises(TypeError, match=r"expected sidestep\.Ranks"):
        enable(tiny_sd(), SRDS(), ranks=2)  # type: ignore[arg-type]


def test_digests_tell_values_apart() -> None:
    x = torch.arange(6.0)
    same = [x, x.clone(), x.view(2, 3).flatten(), x[:3].repeat(2) + x - x[:3].repeat(2)]
    assert len({digest([value]) for value in same}) == 1
    others = [x, x.double(), x.view(2, 3), x + 1e-7, -x, x.bfloat16(), x[:5], 1, 1.0, "1", None]
    others += [[x, x], [[x], x], torch.tensor(1.0), torch.tensor(True), torch.empty(0)]
    assert len({digest(value) for value in others}) == len(others)
    assert digest([object()]) == digest([object()])
