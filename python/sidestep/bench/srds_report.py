"""What the document of ``sidestep bench srds`` says: a table, the targets, and three pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sidestep.bench.srds import Settings
from sidestep.bench.srds_iterates import Iterates, iterates
from sidestep.bench.srds_processes_report import print_processes
from sidestep.bench.srds_results import GOOD, Entry
from sidestep.kernels.core import simulate_parareal
from sidestep.report.pictures import BLUE, GREY, INK, save_figure
from sidestep.runtime.methods.coarse import COARSE
from sidestep.runtime.methods.srds import SRDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGETS = {
    ("trained", 25): 1.7, ("novel", 25): 1.4, ("trained", 100): 4.0, ("novel", 100): 2.5,
    ("trained", 961): 4.3, ("novel", 961): 4.3,
}  # fmt: skip
"""(prompt set, steps): N / ticks that SRDS aims at."""

SHARE = 0.95
"""Of the prompts that are to be good."""

STYLES = {
    ("srds", "krylov"): (BLUE, "o"),
    ("srds", "krylov log-snr"): ("#60a5fa", "o"),
    ("srds", "hold"): ("#0d9488", "s"),
    ("srds", "2m"): ("#be123c", "P"),
    ("srds", "2m-krylov"): ("#7c3aed", "p"),
    ("srds", "extrapolate"): ("#db2777", "X"),
    ("paradigms", "0.3"): ("#fbbf24", ">"),
    ("paradigms", "0.1"): ("#f59e0b", "^"),
    ("paradigms", "0.03"): ("#b45309", "v"),
}
_OTHER = ("#6b7280", "D")
_NAMES = {"srds": "SRDS", "paradigms": "ParaDiGMS"}
_DARK = "#4b5563"
_MOST_SHOWN = 8  # iterates, else the first ones and those at which an image stops
_PICTURED = 100
"""The number of steps that is shown in pictures, or the nearest that was measured."""


def entries(document: dict[str, Any]) -> list[Entry]:
    """The results of one process by set, steps and method, SRDS's default coarse solver first."""
    methods = list(STYLES)

    def place(r: Entry) -> tuple[Any, ...]:
        pair = (r["method"], r["setting"])
        return r["set"], r["steps"], methods.index(pair) if pair in methods else len(methods)

    return sorted((r for r in document["results"] if r["processes"] == 1), key=place)


def default_entries(document: dict[str, Any]) -> list[Entry]:
    """Those of SRDS with its default coarse solver."""
    own = next(iter(COARSE))
    return [r for r in entries(document) if (r["method"], r["setting"]) == ("srds", own)]


def targets(document: dict[str, Any]) -> list[str]:
    """One sentence for every target."""
    lines = []
    for r in default_entries(document):
        target = TARGETS.get((r["set"], r["steps"]))
        if target is not None:
            verdict = "holds" if r["depth"] >= target and r["good"] >= SHARE else "fails"
            lines.append(
                f"{r['set']}, {r['steps']} steps, target {target:g} at {SHARE:.0%} of the prompts "
                f"{GOOD:g} dB or more: {verdict} ({r['depth']:.2f} at {r['good']:.0%} of "
                f"{r['prompts']} prompts)"
            )
    return lines


COLUMNS = (
    "method", "prompts", "iterations", "ticks", "N / ticks", "calls", f"≥ {GOOD:g} dB", "PSNR",
    "p10", "p5", "honest", "seconds", "wall-clock",
)  # fmt: skip
"""Headings of the full table of one prompt set and number of steps."""

_SHORT = ("method", "iterations", "ticks", "N / ticks", "calls", f"≥ {GOOD:g} dB", "PSNR", "p5")


def name_of(r: Entry) -> str:
    """The method in tables."""
    return f"{_NAMES[r['method']]} {r['setting']}"


def cells(r: Entry) -> list[str]:
    """One line of the table."""
    honest = "-" if r["honest"] is None else f"{r['honest']:.0%}"
    return [
        name_of(r), str(r["prompts"]), f"{r['iterations']:.1f}", f"{r['ticks']:.1f}",
        f"{r['depth']:.2f}", f"{r['nfe']:.0f}", f"{r['good']:.0%}", f"{r['psnr']:.1f}",
        f"{r['psnr_p10']:.1f}", f"{r['psnr_p5']:.1f}", honest, f"{r['seconds']:.2f}",
        f"{r['speedup']:.2f}x",
    ]  # fmt: skip


def groups(document: dict[str, Any]) -> dict[tuple[str, int], list[Entry]]:
    """The results of every prompt set and number of steps."""
    found: dict[tuple[str, int], list[Entry]] = {}
    for r in entries(document):
        found.setdefault((r["set"], r["steps"]), []).append(r)
    return found


def print_report(document: dict[str, Any]) -> None:
    """The tables, what they leave out for want of room, and the targets."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = [COLUMNS.index(name) for name in _SHORT]
    for (name, steps), results in groups(document).items():
        prompts = results[0]["prompts"]
        title = f"{name}, {steps} steps of {document['solver']}, {prompts} prompts"
        table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in _SHORT:
            table.add_column(column, justify="left" if column == "method" else "right")
        for r in results:
            table.add_row(*(cells(r)[i] for i in shown))
        console.print(table)
        for r in results:
            of = "" if r["prompts"] == prompts else f" ({r['prompts']} prompts)"
            honest = "" if r["honest"] is None else f", {r['honest']:.0%} of the estimates hold"
            console.print(
                f"  {name_of(r)}{of}: {r['speedup']:.2f}x by the clock, {r['processes']} process"
                f"{honest}",
                highlight=False,
            )
    for line in targets(document):
        console.print(line, highlight=False)
    print_processes(document)


def draw(document: dict[str, Any], settings: Settings, out: Path, shown: int) -> list[Path]:
    """Writes the pictures: ``out``, and beside it ``...-wavefront`` and ``...-iterates``.

    Args:
        document: With results.
        settings: It was made with.
        out: The chart's file.
        shown: Prompts whose iterates are shown, for which they are made again; 0 for none.
    """
    files = {out: depth_chart(document)}
    measured = default_entries(document)
    if measured:
        r = min(measured, key=lambda r: (abs(r["steps"] - _PICTURED), r["set"]))
        wave = wavefront_chart(settings.srds, r["steps"], max(1, round(r["iterations"])))
        files[_beside(out, "wavefront")] = wave
        if shown:
            files[_beside(out, "iterates")] = iterates_figure(remade(settings, r, shown))
    for file, figure in files.items():
        save_figure(figure, file)
    return list(files)


def _beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}-{name}{out.suffix}")


def remade(settings: Settings, r: Entry, shown: int) -> Iterates:
    """The iterates of some prompts of a result, from the one that stopped first to the last."""
    from sidestep.models import load_pipeline

    images = r["images"]
    order = sorted(
        range(len(images["index"])), key=lambda i: (images["ticks"][i], -images["psnr"][i])
    )
    places = np.linspace(0, len(order) - 1, min(shown, len(order))).round().astype(int)
    chosen = [images["index"][order[place]] for place in places]
    texts = settings.texts(r["set"])
    return iterates(
        load_pipeline(settings.model), settings.srds, scheduler=settings.scheduler,
        steps=r["steps"], prompts=[texts[i] for i in chosen],
        seeds=[settings.seed + i for i in chosen], guidance=settings.guidance,
    )  # fmt: skip


# -- N / ticks against N ---------------------------------------------------------------------------


def depth_chart(document: dict[str, Any]) -> Figure:
    """N / ticks against N, a panel a prompt set; hollow where too few prompts are good."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = entries(document)
    sets = list(dict.fromkeys(r["set"] for r in found))
    figure, axes = plt.subplots(
        1, max(1, len(sets)), figsize=(1.2 + 4.6 * max(1, len(sets)), 4.6), layout="constrained",
        squeeze=False, sharey=True,
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for axis, name in zip(axes.flat, sets, strict=False):
        mine = [r for r in found if r["set"] == name]
        for pair in dict.fromkeys((r["method"], r["setting"]) for r in mine):
            results = [r for r in mine if (r["method"], r["setting"]) == pair]
            handles[name_of(results[0])] = _draw_depths(axis, results)
        steps = sorted({r["steps"] for r in mine})
        for n in steps:
            if (name, n) in TARGETS:
                handles["target of SRDS"] = axis.plot(
                    n, TARGETS[name, n], "_", ms=22, mew=2, color="#dc2626", zorder=2,
                    linestyle="none",
                )[0]  # fmt: skip
        axis.axhline(1, color=GREY, lw=1, zorder=1)
        axis.set(xscale="log", yscale="log", xlabel="steps N of the serial sampler", title=name)
        axis.set_xticks(steps, [str(n) for n in steps], minor=False)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axis.tick_params(labelsize=8, which="both")
        axis.grid(alpha=0.25, which="both")
    axes[0, 0].set_ylabel("N / ticks, mean over prompts")
    handles[f"hollow: less than {SHARE:.0%} of the prompts at {GOOD:g} dB"] = axes[0, 0].plot(
        [], [], "o", mfc="white", mec=_DARK, color=_DARK
    )[0]
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", fontsize=8, frameon=False,
        ncols=min(3, len(handles)),
    )  # fmt: skip
    return figure


def _draw_depths(axis: Axes, results: Sequence[Entry]) -> Any:
    """One method in one panel. Returns the legend's handle."""
    colour, mark = STYLES.get((results[0]["method"], results[0]["setting"]), _OTHER)
    x, y = [r["steps"] for r in results], [r["depth"] for r in results]
    axis.plot(x, y, color=colour, lw=1.6, zorder=3)
    for r in results:
        fill = colour if r["good"] >= SHARE else "white"
        axis.plot(r["steps"], r["depth"], mark, ms=7, mec=colour, mfc=fill, zorder=4)
    return axis.plot([], [], color=colour, marker=mark, lw=1.6)[0]


# -- the wavefront ---------------------------------------------------------------------------------


def wavefront_chart(method: SRDS, steps: int, iterations: int) -> Figure:
    """Which step of which block is evaluated in which tick, and for which iterate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    bounds = method.bounds(steps)
    blocks, most = len(bounds) - 1, min(iterations, len(bounds) - 1)
    wave = simulate_parareal(bounds, blocks)  # nothing waits to see whether it is needed
    formed = wave.formed[: most + 1].tolist()
    ticks = formed[most]
    tick, block, iterate, step = wave.chart[wave.chart[:, 0] < ticks].T
    # a chain's first evaluation is the coarse solver's in its iterate, the others are for the next
    use = np.minimum(iterate + (step != np.asarray(bounds)[block - 1]), most + 1)
    colours: list[Any] = [plt.cm.viridis(0.08 + 0.84 * p / max(1, most)) for p in range(most + 1)]
    shades = [*colours, GREY]
    chart = np.full((steps, ticks), np.nan)
    chart[step, tick] = use
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8.6, 7.2), sharex=True, layout="constrained",
        gridspec_kw={"height_ratios": [5, 1]},
    )  # fmt: skip
    top.pcolormesh(np.arange(ticks + 1), np.arange(steps + 1), chart, vmin=0, vmax=most + 1,
                   cmap=ListedColormap(shades), edgecolors="white", linewidth=0.3)  # fmt: skip
    for bound in bounds[1:-1]:
        top.axhline(bound, color=_DARK, lw=0.3, alpha=0.5)
    for p, end in enumerate(formed):
        top.plot([end, end], [0, steps], color=colours[p], lw=1.2, ls=":")
        top.annotate(f"$x_B^{p}$", (end, steps), xytext=(0, 3), textcoords="offset points",
                     ha="center", va="bottom", fontsize=9, color=colours[p])  # fmt: skip
    shown = range(0, blocks, max(1, blocks // 12))
    middles = [(bounds[i] + bounds[i + 1]) / 2 for i in shown]
    top.set_yticks(middles, [str(i + 1) for i in shown], fontsize=8)
    top.set(ylabel="block (a line for each of its steps)", ylim=(0, steps))
    ahead = np.count_nonzero(use > most)
    figure.suptitle(
        f"{steps} steps in {blocks} blocks, {most} iterations: {ticks} ticks "
        f"({steps / ticks:.2f}x fewer), {len(use) - ahead} model calls for them, {ahead} for later "
        "ones",
        fontsize=10, color=INK,
    )  # fmt: skip
    below = np.zeros(ticks)
    for p, shade in enumerate(shades):
        count = np.bincount(tick[use == p], minlength=ticks)
        bottom.bar(np.arange(ticks) + 0.5, count, width=0.9, bottom=below, color=shade)
        below += count
    bottom.set(xlabel="tick", ylabel="calls at once", xlim=(0, ticks + 0.5))
    names = ["coarse sweep", *(f"iteration {p}" for p in range(1, most + 1)), "later iterations"]
    figure.legend(
        handles=[Patch(color=c, label=n) for c, n in zip(shades, names, strict=True)],
        loc="outside lower center", ncols=min(len(names), 6), fontsize=8, frameon=False,
    )  # fmt: skip
    for axis in (top, bottom):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


# -- the iterates ----------------------------------------------------------------------------------


def iterates_figure(found: Iterates) -> Figure:
    """A line of pictures a prompt: iterates 0, 1, 2, ..., serial; below each, how far it is off."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = list(range(len(found.ticks)))
    if len(shown) > _MOST_SHOWN:
        shown = sorted({0, 1, 2, 3, *found.stops})
    count, columns = len(found.prompts), len(shown) + 1
    figure, axes = plt.subplots(
        2 * count, columns, figsize=(1.75 * columns, 3.75 * count + 0.4), squeeze=False,
        gridspec_kw={"hspace": 0.06, "wspace": 0.06}, layout="constrained",
    )  # fmt: skip
    for row, prompt in enumerate(found.prompts):
        above, below = axes[2 * row], axes[2 * row + 1]
        pictures = [*found.pictures[row, shown], found.serial[row]]
        for p, axis, away, picture in zip([*shown, None], above, below, pictures, strict=True):
            for each in (axis, away):
                each.set(xticks=[], yticks=[])
                each.spines[:].set_color(GREY)
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
            error = (picture - found.serial[row]).abs().mean(0)
            away.imshow(8 * error.numpy(), cmap="inferno", vmin=0, vmax=1)
            if p is None:
                caption, name = f"{found.steps} ticks", "serial"
            else:
                name = "coarse sweep" if p == 0 else f"iteration {p}"
                decibels = found.psnr(p)[row]
                caption = f"{found.ticks[p]} ticks, {decibels:.1f} dB"
            mine = p == found.stops[row]
            if mine:
                caption += "\nstops here"
                away.spines[:].set(color=BLUE, linewidth=2)
                axis.spines[:].set(color=BLUE, linewidth=2)
            if row == 0:
                axis.set_title(name, fontsize=9, color=INK)
            away.set_xlabel(caption, fontsize=8, color=BLUE if mine else _DARK)
        above[0].set_ylabel(_folded(prompt), fontsize=8, color=INK)
        below[0].set_ylabel("|difference|\nto serial, x 8", fontsize=7, color=_DARK)
    return figure


def _folded(prompt: str) -> str:
    from textwrap import shorten, wrap

    return "\n".join(wrap(shorten(prompt, 60, placeholder=" ..."), 20))
