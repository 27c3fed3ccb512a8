"""Compiles the fused step ahead of time for GPUs that are not here; prints JSON (needs no GPU).

Run in a process of its own, without TRITON_INTERPRET: `python aot_compile_solver_step.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sidestep.kernels import solver_step_triton as subject

DTYPES = {"registers": "fp32", "weights": "fp32", "noise": "fp32", "table": "fp32", "step": "i64"}
DTYPES |= {"slot": "i64", "stats": "fp32", "sums": "fp32", "arrivals": "i32"}


def compile_step(
    arch: int, R: int, G: int, dtype: str, absent: tuple[str, ...] = (), D: int | None = None
) -> dict[str, object]:
    """Compiles one variant and counts what it does to memory."""
    names = subject.solver_step_kernel.arg_names
    outputs = [f"output{g}" for g in range(3)]
    pointers = DTYPES | {name: dtype for name in [*outputs[:G], "model_input"]}
    pointers = {name: f"*{t}" for name, t in pointers.items() if name not in absent}
    constants = {"R": R, "G": G, "BLOCK": subject.BLOCK, **dict.fromkeys([*absent, *outputs[G:]])}
    if D is not None:
        constants["D"] = D
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    aligned = [] if D is not None else [*pointers, "D"]
    return compile_and_describe(
        subject.solver_step_kernel, arch, signature, constants, aligned, subject.NUM_WARPS
    )


def compile_and_describe(
    kernel: Any,
    arch: int,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: list[str],
    num_warps: int,
) -> dict[str, object]:
    """Compiles a kernel: what it does to memory, and what it needs."""
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constants,
            {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"enable_fp_fusion": False, "num_warps": num_warps},
    )
    ptx = compiled.asm["ptx"]
    return {
        "accesses": Counter(re.findall(r"\b((?:ld|st)\.global(?:\.\w+)*)", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "flushes_denormals": ".ftz" in ptx,
        "local": ".local" in ptx,
        "threads": 32 * num_warps,
        "shared": compiled.metadata.shared,
        "resources": resources(compiled.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a kernel, as ptxas allocated them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def main() -> None:
    """Prints one JSON object: the variant's name to what was found."""
    found = {}
    for arch in (80, 90, 100):
        found[f"sm_{arch} R2 G2 fp16"] = compile_step(arch, 2, 2, "fp16", ("noise", "slot"))
        found[f"sm_{arch} R2 G1 bf16"] = compile_step(arch, 2, 1, "bf16", ("noise", "slot"))
    found["sm_90 R2 G2 fp32"] = compile_step(90, 2, 2, "fp32", ("noise",))
    found["sm_90 R6 G3 bf16 noise"] = compile_step(90, 6, 3, "bf16")
    found["sm_90 R1 G1 fp16 D1"] = compile_step(90, 1, 1, "fp16", ("model_input",), D=1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
