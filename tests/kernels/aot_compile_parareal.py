"""Compiles the parareal operators ahead of time for GPUs that are not here; prints JSON.

Run in a process of its own, without TRITON_INTERPRET: `python aot_compile_parareal.py`.
"""

from __future__ import annotations

import json

from aot_compile_solver_step import compile_and_describe

from sidestep.kernels import parareal_triton as subject

KERNELS = {"gram": subject.difference_gram_kernel, "correct": subject.parareal_correct_kernel}


def compile_kernel(arch: int, kernel: str, size: int, D: int | None = None) -> dict[str, object]:
    """Compiles one variant and counts what it does to memory; `size` is V or R."""
    function = KERNELS[kernel]
    names = function.arg_names
    constants = {"V" if kernel == "gram" else "R": size, "BLOCK": subject.BLOCK}
    if D is not None:
        constants["D"] = D
    kinds = {"arrivals": "*i32", "D": "i32"}
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in names}
    aligned = [n for n, kind in signature.items() if kind != "constexpr"] if D is None else []
    return compile_and_describe(function, arch, signature, constants, aligned, subject.NUM_WARPS)


def main() -> None:
    """Prints one JSON object: the variant's name to what was found."""
    found = {}
    for arch in (80, 90, 100):
        found[f"sm_{arch} gram V3"] = compile_kernel(arch, "gram", 3)
        found[f"sm_{arch} correct R2"] = compile_kernel(arch, "correct", 2)
    found["sm_90 gram V7"] = compile_kernel(90, "gram", 7)
    found["sm_90 correct R6"] = compile_kernel(90, "correct", 6)
    found["sm_90 correct R1 D1"] = compile_kernel(90, "correct", 1, D=1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
