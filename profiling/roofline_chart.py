"""Draws every Triton kernel under the rooflines of three GPUs; computed, nothing is measured.

    attainable rate = min(fp32 rate, operations / byte * bandwidth)

    python profiling/roofline_chart.py docs/images/roofline.png

Bytes and operations of an element are those of docs/kernels.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from kernel_table import KERNELS
from roofline import GPU, GPUS

from sidestep.report.pictures import BLUE, INK, ORANGE, check_writable, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = dict(zip((gpu.name for gpu in GPUS), ("#6b7280", BLUE, ORANGE), strict=True))


def attainable(gpu: GPU, intensity: np.ndarray) -> np.ndarray:
    """Operations a second at so many operations a byte; none of them contracted."""
    return np.minimum(gpu.flops / 2, intensity * gpu.bandwidth)


def chart() -> Figure:
    """The roofs, and on each a point for every kernel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    x = np.geomspace(0.2, 40, 400)
    kernels = [k for k in KERNELS.values() if k.operations]  # compaction only moves
    for gpu in GPUS:
        axis.loglog(x, attainable(gpu, x) / 1e12, color=COLOURS[gpu.name], label=gpu.name)
        at = np.array([k.operations / k.traffic for k in kernels])
        axis.loglog(at, attainable(gpu, at) / 1e12, "o", color=COLOURS[gpu.name], markersize=4)
    for kernel in kernels:
        at = kernel.operations / kernel.traffic
        axis.axvline(at, color="#d9dee7", linewidth=0.8, zorder=0)
        axis.annotate(
            f"{kernel.name}, {kernel.what}", (at, 0.022), rotation=90, fontsize=6.5, color=INK,
            ha="right", va="bottom",
        )  # fmt: skip
    axis.set(
        xlabel="operations a byte of device memory", ylabel="TFLOP/s, fp32, at most",
        ylim=(0.02, 60), xlim=(0.2, 40),
    )  # fmt: skip
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return figure


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description="The Triton kernels under the rooflines.")
    parser.add_argument("out", type=Path, help="the picture (PNG)")
    out = parser.parse_args().out
    check_writable(out)
    save_figure(chart(), out)


if __name__ == "__main__":
    main()
