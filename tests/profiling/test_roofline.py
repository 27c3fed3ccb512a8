"""Occupancy and roofline time by hand, and the command."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

PROFILING = Path(__file__).resolve().parents[2] / "profiling"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PROFILING)
    import roofline

    return roofline


@pytest.mark.parametrize(
    ("gpu", "threads", "registers", "shared", "share", "limit"),
    [
        (0, 128, 32, 0, 1.0, "warps"),  # 64 warps of 1024 registers fill the 65536
        (0, 128, 77, 0, 24 / 64, "registers"),  # 2560 a warp: 25 warps, in fours 24
        (1, 128, 64, 4096, 32 / 64, "registers"),  # 2048 a warp: 32 warps
        (1, 32, 16, 0, 32 / 64, "blocks"),  # 32 blocks of one warp
        (0, 256, 32, 81_000, 16 / 64, "shared memory"),  # 2 blocks of 82048 in 167936
        (1, 256, 32, 81_000, 16 / 64, "shared memory"),  # and in 233472
    ],
)
def test_occupancy(
    roofline: ModuleType,
    gpu: int,
    threads: int,
    registers: int,
    shared: int,
    share: float,
    limit: str,
) -> None:
    found = roofline.occupancy(roofline.GPUS[gpu], threads, registers, shared)
    assert found == (share, limit)


def test_the_longer_of_memory_and_arithmetic(roofline: ModuleType) -> None:
    a100 = roofline.GPUS[0]
    assert roofline.microseconds(a100, 2.039e6) == pytest.approx(1)
    assert roofline.microseconds(a100, 2.039e6, 19.5e6) == pytest.approx(2)  # not contracted
    assert not roofline.by_arithmetic(a100, 2.039e6, 9.7e6)
    assert roofline.by_arithmetic(a100, 2.039e6, 9.8e6)
    assert roofline.step_bytes(registers=2, branches=2, dtype="fp16") == 8 + 8 + 4 + 4


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROFILING / "roofline.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_command() -> None:
    done = _run("4x64x64", "--registers", "3", "--dtype", "fp32")
    row = done.stdout.splitlines()[-1].split("|")
    traffic = 16384 * (2 * 4 * 3 + 2 * 4 * 2)
    assert [cell.strip() for cell in row[1:4]] == ["4x64x64", "16384", str(traffic)]
    assert float(row[4]) == pytest.approx(traffic / 2.039e6, abs=0.005)
    refused = _run("4x-64")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr == "roofline: LATENT: got '4x-64', expected sizes such as 4x64x64\n"


def test_the_chart(roofline: ModuleType, tmp_path: Path) -> None:
    import roofline_chart

    rates = roofline_chart.attainable(roofline.GPUS[0], np.array([1.0, 4.0, 100.0]))
    np.testing.assert_allclose(rates, [2.039e12, 4 * 2.039e12, 19.5e12 / 2])
    (axis,) = roofline_chart.chart().axes
    texts = [text.get_text() for text in axis.texts]
    assert len(texts) == 5 and "difference_gram, 3 vectors, fp32" in texts
    command = [sys.executable, str(PROFILING / "roofline_chart.py"), str(tmp_path / "x.png")]
    assert subprocess.run(command).returncode == 0
    assert Image.open(tmp_path / "x.png").width > 500
