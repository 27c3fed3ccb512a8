"""Compiles the exit operators ahead of time for GPUs that are not here; prints JSON.

Run in a process of its own, without TRITON_INTERPRET: `python aot_compile_exits.py`.
"""

from __future__ import annotations

import json
from typing import Any

from aot_compile_solver_step import compile_and_describe

from sidestep.kernels import exit_compact_triton, exit_score_triton

KINDS = {"arrivals": "*i32", "stays": "*i32", "order": "*i64", "kept": "*i64", "place": "*i64"}
KINDS |= {"group": "*i64", "row_stride": "i64", "eps": "fp32"}
KINDS |= dict.fromkeys(["N", "D", "E", "n", "places", "token_stride"], "i32")


def describe(
    kernel: Any, arch: int, dtype: str, constants: dict[str, Any], aligned: bool, num_warps: int = 4
) -> dict[str, object]:
    """Compiles one variant; aligned: all addresses and sizes are multiples of 16."""
    model = dict.fromkeys(["hidden", "out"], f"*{dtype}")
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else (KINDS | model).get(name, "*fp32")
        for name in names
    }
    free = {"eps", "n", "places"}
    divisible = [n for n, kind in signature.items() if kind != "constexpr" and n not in free]
    return compile_and_describe(
        kernel, arch, signature, constants, divisible if aligned else [], num_warps
    )


def score(arch: int, width: int, k: int, dtype: str, aligned: bool = True) -> dict[str, object]:
    """One variant of the exit score, with LN and the sigmoid."""
    subject = exit_score_triton
    constants = {"k": k, "NORMALIZE": True, "SIGMOID": True, "WIDTH": width}
    constants |= {"TOKENS": max(1, subject.ELEMENTS // width), "FINISH": subject.FINISH}
    warps = max(subject.NUM_WARPS, width // 1024)
    return describe(subject.exit_score_kernel, arch, dtype, constants, aligned, warps)


def main() -> None:
    """Prints one JSON object: the variant's name to what was found."""
    found = {}
    decide, compact = (
        exit_compact_triton.exit_decide_kernel,
        exit_compact_triton.exit_compact_kernel,
    )
    rows = {"ROWS": exit_compact_triton.ROWS}
    block = {"BLOCK": exit_compact_triton.BLOCK}
    for arch in (80, 90, 100):
        found[f"sm_{arch} score D1152 k8 bf16"] = score(arch, 2048, 8, "bf16")
        found[f"sm_{arch} decide"] = describe(decide, arch, "bf16", rows, True)
        found[f"sm_{arch} compact bf16"] = describe(compact, arch, "bf16", block, True)
    found["sm_90 score D256 k1 fp32"] = score(90, 256, 1, "fp32")
    found["sm_90 score D8192 k8 fp16"] = score(90, 8192, 8, "fp16")
    found["sm_90 score D16384 k1 fp32"] = score(90, 16384, 1, "fp32")
    found["sm_90 score D7 k1 bf16"] = score(90, 8, 1, "bf16", aligned=False)
    found["sm_90 decide without groups"] = describe(decide, 90, "", rows | {"group": None}, True)
    found["sm_90 compact fp32"] = describe(compact, 90, "fp32", block, True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
