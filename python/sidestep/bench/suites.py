"""Everything that ``sidestep bench all`` measures: what the README and the pages of docs quote.

Each is one command, run in a folder of its own choosing by `sidestep.bench.everything`.  The pages
are made from the documents by the scripts named here, with ``--reuse``; ``profiling/figures.py``
checks what else is quoted.  (docs/kernels.md is computed, not measured: ``profiling/evidence.py``.)
"""

from __future__ import annotations

from dataclasses import dataclass

PROMPTS = (
    "hamburger with face", "penguin with drum", "blue tiger face", "pink sailboat",
    "crab with basketball", "smiling rocket", "lemon face", "dolphin and rocket",
)  # fmt: skip
"""Of the picture in the README."""

COMPARE = ("compare", "--steps", "50", "--method", "adaptive")
COARSE = ("krylov", "2m-krylov", "hold", "2m", "extrapolate")


@dataclass(frozen=True)
class Suite:
    """One measurement.

    Attributes:
        name: Its document is NAME.json.
        command: Of ``sidestep``, or a script of ``profiling`` and its options.
        writes: Its files, the document first.
        minutes: About how long it takes on two idle cores.
        quick: Options that make it short, for a look at whether all works.
        quick_minutes: And how long it takes with them.
        threads: OMP_NUM_THREADS, if the figure is about so many.
        prints: Whether the document is what it prints, or a file of its own.
    """

    name: str
    command: tuple[str, ...]
    writes: tuple[str, ...]
    minutes: float
    quick: tuple[str, ...]
    quick_minutes: float
    threads: int | None = None
    prints: bool = True

    @property
    def script(self) -> str | None:
        """The file in ``profiling``, if it is one."""
        return self.command[0] if self.command[0].endswith(".py") else None


def _page(name: str, script: str, pictures: tuple[str, ...], minutes: float, quick: float) -> Suite:
    """One that has a script of its own."""
    files = (f"{name}.json", f"{name}.md", *pictures)
    return Suite(name, (script,), files, minutes, ("--quick",), quick, prints=False)


def _compare(name: str, minutes: float, *more: str, threads: int | None = None) -> Suite:
    files = (f"{name}.json", f"{name}.png", f"{name}-calls.png")
    command = (*COMPARE, *more, "--json", "--out", files[1])
    return Suite(name, command, files, minutes, ("--steps", "8", "hot dog"), 0.3, threads)


def _profile(name: str, *more: str) -> Suite:
    command = ("profile", "frog on a bicycle", *more, "--json", "--out", f"{name}-trace.json")
    files = (f"{name}.json", f"{name}-trace.json", f"{name}-trace.png")
    return Suite(name, command, files, 0.5, ("--steps", "4"), 0.3)


SUITES = (
    Suite("step", ("bench", "step", "--json"), ("step.json",), 1, ("--repeats", "20"), 0.5),
    _compare("compare", 2),
    _compare("compare-one-thread", 4, threads=1),
    _compare("examples", 0.5, *PROMPTS),
    _profile("profile", "--steps", "25"),
    _profile("profile-srds", "--steps", "16", "--method", "srds", "--blocks", "4"),
    Suite(
        "calibration",
        (
            "calibrate", "--target", "psnr>=35", "--threshold", "0.0085", "--threshold", "0.0119",
            "--threshold", "0.017", "--threshold", "0.0238", "--out", "calibration.json",
        ),
        ("calibration.json",), 6,
        ("--target", "psnr>=20", "--images", "12", "--steps", "10"), 1, prints=False,
    ),
    Suite(
        "srds-coarse",
        (
            "bench", "srds", "--set", "novel", "--prompts", "4", "--steps", "25", "--steps", "100",
            "--paradigms", "0", "--iterates", "0", "--spacing", "steps", "--spacing", "log-snr",
            *(part for name in COARSE for part in ("--coarse", name)), "--out", "srds-coarse.png",
        ),
        ("srds-coarse.json", "srds-coarse.png"), 15, ("--prompts", "1"), 5, prints=False,
    ),
    _page("solvers", "solver_table.py", ("solvers.png",), 20, 5),
    _page("adaptive-paper", "adaptive_table.py", (), 30, 3),
    _page("adaptive", "adaptive_page.py", ("adaptive.png", "adaptive-first.png"), 120, 20),
    Suite(
        "serve",
        (
            "bench", "serve", "--requests", "24", "--clients", "12", "--steps", "4", "--steps", "6",
            "--repeats", "3", "--json",
        ),
        ("serve.json",), 2, ("--requests", "6", "--clients", "3", "--repeats", "1"), 0.5, threads=1,
    ),
    Suite(
        "calibration-exits",
        (
            "calibrate", "--model", "emoji-dit", "--method", "early-exit", "--steps", "20",
            "--target", "psnr>=35", "--threshold", "0.03", "--threshold", "0.06",
            "--threshold", "0.09", "--threshold", "0.12", "--threshold", "0.16",
            "--threshold", "0.24", "--out", "calibration-exits.json",
        ),
        ("calibration-exits.json",), 10,
        ("--target", "psnr>=20", "--images", "12", "--steps", "10"), 1, prints=False,
    ),
    _page("exits", "exits_page.py", ("exits.png",), 60, 2),
    _page("srds", "srds_page.py", ("srds.png", "srds-iterates.png", "srds-wavefront.png"), 220, 30),
)  # fmt: skip
