"""SRDS on several processes: the same bits, iterations and estimates as in one engine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks_jobs
import torch
from engine_cases import run, solo
from ranks_jobs import CASES, NAN_AT, broken, not_a_number, request_of

from sidestep.kernels.core import parareal_cost
from sidestep.runtime.engine import Engine, Request, Result
from sidestep.runtime.ranks import Ranks

HERE = Path(ranks_jobs.__file__)
JOBS = ("alone:1", "blocks:2", "blocks:3", "guidance:2", "guidance:4", "dying:3", "stuck:3")
JOBS += ("helper_dying:2", "sets:4")
SPLIT = ("ddim-early", "unipc-early", "sde-exact", "one-block")

Told = list[dict[str, Any]]  # by rank


LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[None]:
    """Processes with one thread each, that find what this one finds; waits for them."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
    }
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            yield
            assert process.wait(timeout=120) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):  # none is left behind
                os.killpg(process.pid, signal.SIGKILL)


def results(folder: Path, job: str, size: int) -> dict[str, Told]:
    """By case, what every rank has found that is still there."""
    files = [folder / f"{job}-{size}-{rank}.pt" for rank in range(size)]
    found = [torch.load(file) for file in files if file.exists()]
    assert found
    return {case: [of[case] for of in found if case in of] for each in found for case in each}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    (path / "torchrun").mkdir()
    with started(*LAUNCH, str(HERE), str(path / "torchrun"), "alone"):
        with started(str(HERE), str(path), *JOBS):
            pass
    return path


def in_one(request: Request) -> Result:
    """The same in one process."""
    return solo(request, capacity=128, buckets=range(1, 257))


def assert_as_in_one(told: Told, case: str) -> None:
    expected = in_one(request_of(case))
    for of_rank in told:
        assert torch.equal(of_rank["x"], expected.x)
        assert of_rank["iterations"] == expected.summary.iterations
        assert of_rank["errors"] == expected.summary.errors
        assert of_rank["counted"] == [of_rank["calls"], of_rank["nfe"]]


def sentence(told: Told) -> str:
    """The one that all ranks have raised."""
    (found,) = {of_rank["error"] for of_rank in told}
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", list(CASES))
def test_ranks_come_to_the_same_as_one_process(folder: Path, case: str, size: int) -> None:
    told = results(folder, "blocks", size)[case]
    assert len(told) == size
    assert_as_in_one(told, case)


@pytest.mark.parametrize("size", [2, 3])
def test_nothing_is_evaluated_twice_or_on_two_ranks(folder: Path, size: int) -> None:
    for case in ("2m-exact", "2m-most", "sde-exact", "one-block"):
        _, method, n = CASES[case]
        bounds = method.bounds(ranks_jobs.STEPS)
        expected = n * parareal_cost(bounds, method.iterations(len(bounds) - 1))
        assert sum(of["nfe"] for of in results(folder, "blocks", size)[case]) == expected


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_are_not_in_step_change_nothing(folder: Path, size: int) -> None:
    found = results(folder, "blocks", size)
    assert_as_in_one(found["slow"], "ddim-early")
    assert_as_in_one(found["padded"], "unipc-early")


def test_a_job_of_one_process_is_one_engine(folder: Path) -> None:
    for case, told in results(folder, "alone", 1).items():
        assert_as_in_one(told, case)


@pytest.mark.parametrize("size", [2, 3])
def test_latents_that_are_not_finite_are_told_to_all(folder: Path, size: int) -> None:
    found = sentence(results(folder, "blocks", size)["nan"])
    engine = Engine((3, 5), capacity=64, buckets=range(1, 129))
    engine.submit(request_of("ddim-odd"))
    (expected,) = run(engine, broken(None, NAN_AT, not_a_number)).values()
    assert str(expected.error) in found
    assert "block 3 of 5 in iteration 1: the latents are not finite" in found


@pytest.mark.parametrize("size", [2, 3])
def test_an_error_of_one_rank_is_raised_on_all_and_the_group_goes_on(
    folder: Path, size: int
) -> None:
    found = results(folder, "blocks", size)
    assert sentence(found["raised"]) == f"rank {size - 1}: out of paper"
    assert sentence(found["raised at once"]) == "rank 0: out of paper"
    assert "rank 1 was given [4, 3, 5] latents" in sentence(found["other"])
    assert_as_in_one(found["again"], "ddim-odd")


@pytest.mark.parametrize("size", [2, 4])
def test_guidance_branches_on_two_ranks_are_the_same_bits(folder: Path, size: int) -> None:
    found = results(folder, "guidance", size)
    for case in SPLIT:
        assert_as_in_one(found[case], case)
        for first, second in zip(found[case][::2], found[case][1::2], strict=True):
            assert first["calls"] == second["calls"]
    assert sentence(found["raised"]) == "rank 1: out of paper"
    assert "the latents are not finite" in sentence(found["nan"])
    assert_as_in_one(found["again"], "ddim-early")


def test_a_job_can_be_several_sets_of_ranks(folder: Path) -> None:
    for case, told in results(folder, "sets", 4).items():
        assert len(told) == 2
        assert_as_in_one(told, case)


def test_a_team_samples_serially_without_a_method(folder: Path) -> None:
    for told in results(folder, "guidance", 2)["serial"]:
        request = request_of("ddim-early")
        serial = Request(request.plan, request.x, request.conditioning, request.guidance)
        assert torch.equal(told["x"], in_one(serial).x)
        assert told["calls"] == ranks_jobs.STEPS


def test_a_rank_that_dies_ends_the_job(folder: Path) -> None:
    told = results(folder, "dying", 3)["dead"]
    assert len(told) == 2  # rank 2 is no more
    for of_rank in told:
        assert "rank 2" in of_rank["error"]
        # at once; or by the time-out of 20 s, where gloo forgets a receive posted as a link closes
        assert of_rank["seconds"] < 25
    (told,) = results(folder, "helper_dying", 2)["dead"]
    assert "rank 0 got no word from rank 1 while it waited for the model's output" in told["error"]


def test_a_rank_that_hangs_is_named(folder: Path) -> None:
    told = results(folder, "stuck", 3)["stuck"]
    for of_rank in told[::2]:
        assert "rank 2 got no word from rank 1 while it waited for its states" in of_rank["error"]
        assert of_rank["seconds"] < 5


def test_torchrun_starts_it(folder: Path) -> None:
    for case, told in results(folder / "torchrun", "alone", 2).items():
        assert_as_in_one(told, case)


def test_without_a_process_group_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"expected torch\.distributed\.init_process_group"):
        Ranks()
