"""What the document of ``sidestep bench adaptive`` says: the comparison at equal calls, and charts.

A family's results are its settings; between two neighbours on its upper edge (no other setting has
fewer calls and a higher mean PSNR) the PSNR is interpolated linearly in the calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestep.metrics import percentile
from sidestep.report.pictures import save_figure
from sidestep.runtime.methods.adaptive import Adaptive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
EQUAL_CALLS = {50: (29, 24, 20, 17), 25: (15, 13, 12, 11), 250: (50, 33, 25, 20)}
TARGETS = {50: (2.5, 35.0, 30.0), 25: (1.7, 32.0, 0.0), 250: (10.0, 35.0, 0.0)}
"""steps: (times fewer calls, mean PSNR, 10th percentile) that the default mode aims at."""

PROMPTS = 64
CHOSEN_ON = range(2, PROMPTS, 4)
"""The novel prompts that constants of the default were chosen on: two numbers beside the network,
which was trained on none of them (`sidestep.runtime.methods.criteria.learned`)."""

STYLES = {
    "default": ("#2563eb", "o"),
    "paper": ("#dc2626", "s"),
    "uniform-hold": ("#9ca3af", "v"),
    "uniform-linear": ("#4b5563", "^"),
    "zeus": ("#d97706", "D"),
    "sada": ("#db2777", "P"),
    "fewer-steps": ("#78350f", "x"),
    "deepcache": ("#65a30d", "*"),
    "oracle": ("#000000", "_"),
}
OTHER_COLOURS = ("#0d9488", "#7c3aed", "#0891b2", "#be185d", "#15803d", "#a16207")


def settings(document: dict[str, Any]) -> list[tuple[str, int]]:
    """(scheduler, steps) that have results, most steps last but in the usual order."""
    found = dict.fromkeys((r["steps"], r["solver"]) for r in document["results"])
    order = {steps: i for i, steps in enumerate(EQUAL_CALLS)}
    return [
        (solver, steps)
        for steps, solver in sorted(found, key=lambda s: order.get(s[0], len(order)))
    ]


def by_family(document: dict[str, Any], solver: str, steps: int) -> dict[str, list[Result]]:
    """The results of one scheduler and number of steps, by family, fewest calls first."""
    found: dict[str, list[Result]] = {}
    for r in document["results"]:
        if (r["solver"], r["steps"]) == (solver, steps):
            found.setdefault(r["policy"], []).append(r)
    order = [name for name in STYLES if name in found]
    order += [name for name in found if name not in STYLES]
    return {name: sorted(found[name], key=lambda r: r["calls"]) for name in order}


Point = tuple[float, float, float]
"""(calls, mean PSNR, 10th percentile)"""


def point(result: Result, count: int | None = None) -> Point:
    """A result's point, over its first ``count`` images or over all."""
    calls, values = (result["images"][name][:count] for name in ("calls", "psnr"))
    return sum(calls) / len(calls), sum(values) / len(values), percentile(values, 0.1)


def edge(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in calls and mean both, fewest calls first."""
    best: list[Point] = []
    for candidate in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or candidate[1] > best[-1][1]:
            best.append(candidate)
    return best


def at_calls(points: Sequence[Point], calls: float) -> tuple[float, float] | None:
    """Mean and percentile at so many calls, interpolated; None outside what was measured."""
    known = edge(points)
    if not known or not known[0][0] <= calls <= max(p[0] for p in points):
        return None
    for a, b in pairwise(known):
        if calls <= b[0]:
            share = (calls - a[0]) / (b[0] - a[0])
            return a[1] + share * (b[1] - a[1]), a[2] + share * (b[2] - a[2])
    return known[-1][1:]  # what has more calls is no better


def equal_calls(steps: int) -> tuple[int, ...]:
    """Numbers of calls at which the families are compared."""
    shares = (0.6, 0.5, 0.4, 0.3)
    return EQUAL_CALLS.get(steps) or tuple(round(share * steps) for share in shares)


def compared(
    document: dict[str, Any], solver: str, steps: int, count: int | None = None
) -> dict[str, list[tuple[float, float] | None]]:
    """For every family (mean PSNR, 10th percentile) at each of `equal_calls`.

    Args:
        count: Over the first images only, with the families that have no more. Without it over all
            images, without these families.
    """
    return {
        family: [at_calls(points, n) for n in equal_calls(steps)]
        for family, points in curves(document, solver, steps, count).items()
    }


def few(document: dict[str, Any], results: list[Result]) -> bool:
    """Whether these were measured on the first prompts only."""
    return len(results[0]["images"]["psnr"]) < len(document["prompts"])


def subset(document: dict[str, Any], solver: str, steps: int) -> int | None:
    """The first prompts some families were measured on; None if all were measured on all."""
    families = by_family(document, solver, steps).values()
    counts = [len(r[0]["images"]["psnr"]) for r in families if few(document, r)]
    return max(counts, default=None)


def targets(document: dict[str, Any]) -> list[str]:
    """One sentence for every scheduler and number of steps that has a target."""
    lines = []
    for solver, steps in settings(document):
        results = by_family(document, solver, steps).get("default", [])
        if steps not in TARGETS or not results:
            continue
        ratio, mean, tail = TARGETS[steps]
        good = [r for r in results if r["psnr"] >= mean and r["psnr_p10"] >= tail]
        wanted = f"{ratio:g}x fewer calls at {mean:g} dB"
        wanted += f", 10th percentile {tail:g}" if tail else ""
        if not good:
            lines.append(f"{solver}, {steps} steps, target {wanted}: fails at every threshold")
            continue
        best = max(good, key=lambda r: r["ratio"])
        verdict = "holds" if best["ratio"] >= ratio else "fails"
        timed = best["speedup"] is not None
        lines.append(
            f"{solver}, {steps} steps, target {wanted}: {verdict} ({best['setting']}: "
            f"{best['ratio']:.2f}x, {best['psnr']:.1f} dB, {best['psnr_p10']:.1f} dB"
            + (f", wall-clock {best['speedup']:.2f}x)" if timed else ")")
        )
    return lines


def held_out(document: dict[str, Any]) -> list[str]:
    """The default at its own threshold, on the prompts that none of its constants was chosen on.

    A sentence for every scheduler and number of steps; none where not all prompts were measured.
    """
    if len(document["prompts"]) < PROMPTS:
        return []
    own = Adaptive()
    lines = []
    for solver, steps in settings(document):
        for r in by_family(document, solver, steps).get("default", []):
            if r["method"] == repr(own):
                calls, values = (
                    [v for i, v in enumerate(r["images"][name]) if i not in CHOSEN_ON]
                    for name in ("calls", "psnr")
                )
                lines.append(
                    f"{solver}, {steps} steps: {sum(calls) / len(calls):.1f} calls, "
                    f"{sum(values) / len(values):.1f} dB, 10th percentile "
                    f"{percentile(values, 0.1):.1f} (all {PROMPTS}: {r['calls']:.1f}, "
                    f"{r['psnr']:.1f}, {r['psnr_p10']:.1f})"
                )
    return lines


def cell(values: tuple[float, float] | None) -> str:
    """Mean and percentile as a table shows them."""
    return "-" if values is None else f"{values[0]:.1f} / {values[1]:.1f}"


def number(value: float | None, form: str = ".1f") -> str:
    """A number of a table, or a dash."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def curves(
    document: dict[str, Any], solver: str, steps: int, count: int | None = None
) -> dict[str, list[Point]]:
    """The points of every family, over the images that `compared` takes."""
    return {
        family: [point(r, count) for r in results]
        for family, results in by_family(document, solver, steps).items()
        if count is not None or not few(document, results)
    }


def chart(document: dict[str, Any], *, first: bool = False) -> Figure:
    """PSNR against model calls, a panel for every scheduler and number of steps.

    Args:
        first: Over the first prompts only, with the families that were measured on no others.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = {pair: subset(document, *pair) if first else None for pair in settings(document)}
    pairs = [pair for pair, count in counts.items() if count or not first]
    columns = max(1, min(3, len(pairs)))
    rows = max(1, -(-len(pairs) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 + 4.4 * columns, 1.3 + 3.9 * rows), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    others = [r["policy"] for r in document["results"] if r["policy"] not in STYLES]
    colours = dict(zip(dict.fromkeys(others), OTHER_COLOURS * 3, strict=False))
    handles: dict[str, Any] = {}
    for axis, pair in zip(axes.flat, pairs, strict=False):
        found = curves(document, *pair, counts[pair])
        for family, points in found.items():
            handles[family] = _draw(axis, family, points, colours)
        count = counts[pair]
        of = f", first {count} prompts" if count else ""
        axis.set_title(f"{pair[0]}, {pair[1]} steps{of}", fontsize=10)
        axis.set_xlabel("model calls per image", fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        _limit(axis, pair[1], [p for points in found.values() for p in points])
    for axis in axes.flat[len(pairs) :]:
        axis.set_axis_off()
    for row in axes:
        row[0].set_ylabel("PSNR to the full run, dB", fontsize=9)
    names = list(dict.fromkeys(f for f in [*STYLES, *handles] if f in handles))
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center",
        ncols=min(len(names), 2 * columns + 2), fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


def draw(document: dict[str, Any], out: Path) -> list[Path]:
    """Writes the chart, and beside it (``...-first.png``) the one of the first prompts if any."""
    files = {out: False}
    if any(subset(document, *pair) for pair in settings(document)):
        files[out.with_name(f"{out.stem}-first{out.suffix}")] = True
    for file, first in files.items():
        save_figure(chart(document, first=first), file)
    return list(files)


def _limit(axis: Any, steps: int, points: list[Point]) -> None:
    """Shows what saves calls; a setting that saves none is as far up as one likes."""
    right = (0.72 if steps < 100 else 0.3) * steps
    shown = [psnr for calls, psnr, _ in points if calls <= right]
    axis.set_xlim(right=right)
    if shown:
        axis.set_ylim(min(shown) - 2, max(shown) + 3)


def _draw(axis: Any, family: str, points: list[Point], colours: dict[str, str]) -> Any:
    """One family: its settings as marks, its upper edge as a line. Returns the legend's handle."""
    colour, mark = STYLES.get(family) or (colours[family], ".")
    bold = family == "default"
    top, width = (10, 2.6) if bold else (2, 1.0)
    look = {"color": colour, "marker": mark, "ms": 6 if bold else 4.5, "zorder": top + 1}
    if family == "oracle":
        look["mew"] = 2
    x, y, _ = zip(*edge(points), strict=True)
    axis.plot(x, y, color=colour, lw=width, zorder=top)
    x, y, _ = zip(*points, strict=True)
    axis.plot(x, y, linestyle="none", **look)
    return axis.plot([], [], lw=width, **look)[0]


def print_report(document: dict[str, Any]) -> None:
    """The tables at equal calls, and the targets."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for solver, steps in settings(document):
        for images in dict.fromkeys([None, subset(document, solver, steps)]):
            of = "" if images is None else f", first {images} prompts"
            table = Table(title=f"{solver}, {steps} steps{of}: mean PSNR / 10th percentile")
            table.add_column("policy")
            for n in equal_calls(steps):
                table.add_column(f"{n} calls", justify="right")
            for family, cells in compared(document, solver, steps, images).items():
                table.add_row(family, *map(cell, cells))
            console.print(table)
    for line in targets(document):
        console.print(line)
