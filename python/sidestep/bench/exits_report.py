"""What the document of ``sidestep bench exits`` says: tables, charts, and the gate's answer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]

STYLES = {
    "full": ("#000000", "."),
    "overhead": ("#6b7280", ","),
    "static": ("#2563eb", "o"),
    "static-exits": ("#0891b2", "<"),
    "sample": ("#7c3aed", "s"),
    "sample+adaptive": ("#db2777", "P"),
    "fixed-exit": ("#9ca3af", "v"),
    "fewer-steps": ("#78350f", "x"),
    "adaptive": ("#d97706", "D"),
    "first-block-cache": ("#65a30d", "*"),
    "oracle": ("#4b5563", "+"),
    "adadiff": ("#dc2626", "^"),
}
PANELS = (
    ("share", "psnr", "share of blocks run", "PSNR to the full model, dB"),
    ("speedup", "psnr", "times faster than the full model", "PSNR to the full model, dB"),
    ("share", "fd_small", "share of blocks run", "FD-small to the full model"),
)
"""x, y and their names, one a row of charts."""


def settings(document: dict[str, Any]) -> list[tuple[int, int]]:
    """(steps, batch) that have results, in order."""
    return sorted({(r["steps"], r["batch"]) for r in document["results"]})


def of(document: dict[str, Any], steps: int, batch: int) -> list[Result]:
    """The results of one setting: by method, and the most blocks first."""
    order = list(STYLES)
    found = [r for r in document["results"] if (r["steps"], r["batch"]) == (steps, batch)]
    return sorted(found, key=lambda r: (order.index(r["method"]), -r["share"]))


def chart(document: dict[str, Any]) -> Figure:
    """PSNR and FD-small against blocks and speed-up, at the largest batch of each number of steps.

    Settings with which all blocks ran are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    largest = dict(settings(document))  # by steps
    figure, axes = plt.subplots(
        len(PANELS), len(largest), figsize=(1.5 + 4.4 * len(largest), 1.3 + 3.6 * len(PANELS)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for column, (steps, batch) in enumerate(largest.items()):
        results = of(document, steps, batch)
        for row, (x, y, x_name, y_name) in enumerate(PANELS):
            axis = axes[row][column]
            for method in STYLES:
                points = sorted(
                    (r[x], r[y])
                    for r in results
                    if r["method"] == method and r["share"] < 1 and None not in (r[x], r[y])
                )
                if points:
                    colour, mark = STYLES[method]
                    (handles[method],) = axis.plot(
                        *zip(*points, strict=True), color=colour, marker=mark, ms=5,
                        lw=2.4 if method == "static" else 1.2,
                    )  # fmt: skip
            if y == "fd_small":
                _chance(axis, results)
            axis.set_xlabel(x_name, fontsize=9)
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=8)
            if column == 0:
                axis.set_ylabel(y_name, fontsize=9)
        axes[0][column].set_title(f"{steps} steps, batch {batch}", fontsize=10)
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=5, fontsize=8,
            frameon=False,
        )  # fmt: skip
    return figure


def _chance(axis: Any, results: list[Result]) -> None:
    """A line at the FD-small of other seeds, on an axis of logarithms."""
    axis.set_yscale("log")
    for r in results:
        if r.get("fd_small_other_seeds") is not None:
            axis.axhline(r["fd_small_other_seeds"], color="#9ca3af", lw=0.8, ls=":")


def gate_lines(document: dict[str, Any]) -> list[str]:
    """What the gate came to, a line for each number of steps and budget, and what follows."""
    lines = [
        f"gate, {entry['steps']} steps, budget {entry['budget']:g}: rank {entry['rank']:.2f}, "
        f"oracle {entry['layers_oracle']:.1f} blocks a step, static {entry['layers_static']:.1f} "
        f"({entry['saving']:.1%} fewer): {'passed' if entry['passed'] else 'not passed'}"
        for entry in document["gate"]
    ]
    if lines:
        lines.append(f"the gate is for mode {document['gate_default']!r}")
    return lines


def notes(document: dict[str, Any]) -> list[str]:
    """What else is to be known."""
    lines = gate_lines(document)
    for r in document["results"]:
        level = r.get("fd_small_other_seeds")
        if level is not None and not math.isnan(level):
            lines.append(f"{r['steps']} steps: FD-small of full runs from other seeds: {level:.3g}")
        if "bit_equal" in r:
            said = "the same bits as" if r["bit_equal"] else "other pictures than"
            lines.append(
                f"{r['steps']} steps, batch {r['batch']}: threshold 0, {r['setting']}: {said} the "
                f"full model, {1 / r['speedup'] - 1:+.1%} seconds"
            )
    if document["first_block_cache"]:
        lines.append(f"first-block-cache: left out: {document['first_block_cache']}")
    return lines


def cell(value: float | None, form: str) -> str:
    """A number of a table, or a dash."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def print_report(document: dict[str, Any]) -> None:
    """A table of every setting, and the gate."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for steps, batch in settings(document):
        table = Table(title=f"{steps} steps, batch {batch}", pad_edge=False)
        table.add_column("method", no_wrap=True)
        for name in ("blocks", "seconds", "faster", "PSNR / 10 %", "FD-small"):
            table.add_column(name, justify="right")
        for r in of(document, steps, batch):
            table.add_row(
                f"{r['method']} {r['setting']}", f"{r['share']:.1%}", f"{r['seconds']:.2f}",
                cell(r["speedup"], ".2f"), f"{r['psnr']:.1f} / {r['psnr_p10']:.1f}",
                cell(r["fd_small"], ".3g"),
            )  # fmt: skip
        console.print(table)
    for line in notes(document):
        console.print(line, markup=False)
