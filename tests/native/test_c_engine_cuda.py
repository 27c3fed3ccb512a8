"""The C engine's CUDA path on the CPU, under sanitizers: its bits are those of the CPU path."""

from __future__ import annotations

from pathlib import Path

import capi
import cuda_calls

from sidestep.runtime.schedules import DiscreteVP
from sidestep.runtime.solvers import find_solver

SANITIZER = "address,undefined"


def test_both_devices_give_the_same_bits(tmp_path: Path) -> None:
    objects = capi.built("capi", "sidestep") / "CMakeFiles/sidestep_objects.dir"
    library = [path for path in objects.rglob("*.o") if path.name != "no_cuda.cpp.o"]
    sources = [
        *cuda_calls.KERNELS, capi.ROOT / "csrc/core/cuda_memory.cpp",
        cuda_calls.SHIM / "engine.cpp",
    ]  # fmt: skip
    options = ("-O1", "-g1", f"-fsanitize={SANITIZER}")
    ours = [cuda_calls.compiled(tmp_path, source, *options) for source in sources]
    ours.append(cuda_calls.compiled(tmp_path, cuda_calls.SHIM / "fibres.cpp", "-O1"))
    program = cuda_calls.linked(tmp_path / "engine", SANITIZER, [*ours, *library])
    schedule = DiscreteVP.from_betas([0.0001 + 0.00002 * i for i in range(1000)])
    find_solver("dpmsolver++2m").plan(schedule, "linspace", 12).save(tmp_path / "plan")
    done = cuda_calls.run(program, tmp_path / "plan")
    assert (done.returncode, done.stderr) == (0, "")
    on_cpu, on_cuda, verdict = done.stdout.splitlines()
    assert on_cpu == on_cuda and verdict == "the same bits"
    assert int(on_cpu.split()[2]) < 12 * 10  # 10 rows, some of which skipped
