"""``sidestep bench``: measurements side by side with diffusers, in one run."""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sidestep.cli import common
from sidestep.report.environment import environment

app = typer.Typer(no_args_is_help=True, help="Measurements side by side with peers, in one run.")

Fresh = Annotated[bool, typer.Option(help="Measure again what --out already has.")]


@app.command("step")
def step(
    repeats: Annotated[int, typer.Option(help="Timed repetitions of each case.")] = 200,
    as_json: common.Json = False,
) -> None:
    """The fused solver step against diffusers' scheduler.step and against a memory copy."""
    from sidestep.bench import step as suite

    common.check_positive(repeats=repeats)
    document = suite.run(repeats=repeats)
    if as_json:
        common.print_json(document)
        return
    suite.print_report(document)


@app.command("solvers")
def solvers(
    model: common.Model = "emoji-sd",
    prompts: Annotated[int, typer.Option(help="Novel prompts to average over.")] = 8,
    reference_steps: Annotated[int, typer.Option(help="Calls of the reference run.")] = 1000,
    calls: Annotated[
        list[int] | None, typer.Option(help="Model calls (repeat). Default: 10 15 20 25.")
    ] = None,
    guidance: common.Guidance = 7.5,
    seed: common.Seed = 0,
    out: common.Out = Path("sidestep-solvers.png"),
    as_json: common.Json = False,
) -> None:
    """Distance to a 1000-step reference against model calls, for every solver and grid."""
    from sidestep.bench import solvers as suite
    from sidestep.report.pictures import check_writable, save_figure

    calls = calls or [10, 15, 20, 25]
    common.check_run(
        guidance=guidance, seed=seed, prompts=prompts, reference_steps=reference_steps,
        calls=min(calls),
    )  # fmt: skip
    check_writable(out)
    document = suite.run(
        model=model, prompts=prompts, reference_steps=reference_steps, calls=calls,
        guidance=guidance, seed=seed,
    )  # fmt: skip
    document["environment"] = environment()
    save_figure(suite.chart(document), out)
    document["pictures"] = [str(out)]
    if as_json:
        common.print_json(document)
        return
    suite.print_report(document)
    print(f"chart: {out}")


@app.command("adaptive")
def adaptive(
    model: common.Model = "emoji-sd",
    prompts: Annotated[int, typer.Option(help="Novel prompts.")] = 64,
    solver: Annotated[
        list[str] | None,
        typer.Option(
            help="Schedulers (repeat): ddim, euler, dpmsolver++, or a class. Default: these three."
        ),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Steps (repeat). Default: 50 25."),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(help="Families to measure, by commas: default,paper,zeus,... All if empty."),
    ] = "",
    guidance: common.Guidance = 7.5,
    seed: common.Seed = 0,
    batch: common.Batch = 16,
    subset: Annotated[
        int, typer.Option(help="First prompts, for the oracle and the modes beside the default.")
    ] = 16,
    oracle_trials: Annotated[
        int, typer.Option(help="Oracle: true runs for each prompt and number of calls.")
    ] = 16,
    fresh: Fresh = False,
    out: common.Out = Path("sidestep-adaptive.png"),
    as_json: common.Json = False,
) -> None:
    """Every policy of reuse beside the plain run: PSNR against model calls, and wall-clock.

    Results are kept beside the chart, in a file of the same name ending in .json, after every
    policy; what is there already is not measured again.
    """
    from sidestep.bench import adaptive as suite
    from sidestep.bench import adaptive_report as report
    from sidestep.report.pictures import check_writable

    counts = steps or [50, 25]
    common.check_run(
        guidance=guidance, seed=seed, prompts=prompts, batch=batch, steps=min(counts),
        subset=subset, oracle_trials=oracle_trials,
    )  # fmt: skip
    check_writable(out)
    document = suite.run(
        settings=suite.Settings(
            model=model, prompts=prompts, guidance=guidance, seed=seed, batch=batch, subset=subset
        ),
        solvers=solver or suite.SOLVERS, steps=counts, chosen=[p for p in policies.split(",") if p],
        oracle_trials=oracle_trials, state=out.with_suffix(".json"), fresh=fresh,
    )  # fmt: skip
    pictures = report.draw(document, out)
    document["pictures"] = [str(picture) for picture in pictures]
    if as_json:
        common.print_json(document)
        return
    report.print_report(document)
    print(f"charts: {', '.join(map(str, pictures))}; results: {out.with_suffix('.json')}")


class PromptSet(str, Enum):
    """The prompt sets of the command line."""

    novel = "novel"
    trained = "trained"
    both = "both"


SetOption = Annotated[
    PromptSet, typer.Option("--set", help="Prompts: novel ones, trained captions, or both.")
]
StepCounts = Annotated[
    list[int] | None, typer.Option(help="Steps (repeat). Default: 25 50 100 196 961.")
]
OneSolver = Annotated[str, typer.Option(help="Scheduler: ddim, euler, dpmsolver++, or a class.")]
Blocks = Annotated[int | None, typer.Option(help="Blocks. Default: as many as SRDS itself takes.")]
Tolerance = Annotated[
    float | None, typer.Option(help="Error in the latents to stop at. Default: that of SRDS.")
]
Coarse = Annotated[
    list[str] | None,
    typer.Option(
        help="Coarse solvers to compare (repeat): krylov, hold, 2m, 2m-krylov, extrapolate. "
        "Default: the first."
    ),
]
Spacing = Annotated[
    list[str] | None,
    typer.Option(
        help="What blocks are of equal length in (repeat to compare): steps, log-snr. "
        "Default: the first."
    ),
]
Paradigms = Annotated[
    int, typer.Option(help="Prompts of each set that ParaDiGMS runs on too; 0 for none.")
]
ParadigmsTolerance = Annotated[
    list[float] | None,
    typer.Option(help="Tolerances of ParaDiGMS (repeat). Default: 0.1, as published, 0.03."),
]

Processes = Annotated[
    int,
    typer.Option(
        help="Above 1: measure only how so many processes on this machine make each picture "
        "together, without charts."
    ),
]


@app.command("srds")
def srds(
    model: common.Model = "emoji-sd",
    steps: StepCounts = None,
    prompt_set: SetOption = PromptSet.both,
    prompts: Annotated[int, typer.Option(help="Prompts of each set.")] = 64,
    solver: OneSolver = "ddim",
    blocks: Blocks = None,
    tolerance: Tolerance = None,
    coarse: Coarse = None,
    spacing: Spacing = None,
    paradigms: Paradigms = 16,
    paradigms_tolerance: ParadigmsTolerance = None,
    guidance: common.Guidance = 7.5,
    seed: common.Seed = 0,
    batch: Annotated[int, typer.Option(help="Prompts a batch.")] = 4,
    iterates: Annotated[int, typer.Option(help="Prompts whose iterates are drawn.")] = 3,
    processes: Processes = 1,
    fresh: Fresh = False,
    out: common.Out = Path("sidestep-srds.png"),
    as_json: common.Json = False,
) -> None:
    """SRDS against the serial sampler and ParaDiGMS: sequential calls, all calls, PSNR, wall-clock.

    Results are kept beside the chart, in a file of the same name ending in .json, after every
    batch; what is there already is not measured again.
    """
    from sidestep.bench import srds as suite
    from sidestep.bench import srds_processes as together
    from sidestep.bench import srds_report as report
    from sidestep.report.pictures import check_writable

    counts = steps or list(suite.STEPS)
    common.check_run(
        guidance=guidance, seed=seed, prompts=prompts, batch=batch, steps=min(counts),
        processes=processes,
    )  # fmt: skip
    tolerances = paradigms_tolerance or list(suite.Settings.tolerances)
    common.check_not_negative(paradigms=paradigms, iterates=iterates)
    for each in tolerances:
        common.check_not_negative(paradigms_tolerance=each)
    settings = suite.Settings(
        model=model, solver=solver, prompts=prompts, guidance=guidance, seed=seed, batch=batch,
        srds=suite.srds_settings(blocks, tolerance, coarse or [], counts, spacing or []),
        peers=paradigms, tolerances=tuple(tolerances),
    )  # fmt: skip
    check_writable(out)
    document = (suite.run if processes == 1 else partial(together.run, processes=processes))(
        settings=settings,
        sets=suite.SETS if prompt_set is PromptSet.both else [prompt_set.value],
        steps=counts, coarse=coarse or [], spacing=spacing or [], state=out.with_suffix(".json"),
        fresh=fresh,
    )  # fmt: skip
    pictures = report.draw(document, settings, out, iterates) if processes == 1 else []
    document["pictures"] = [str(picture) for picture in pictures]
    if as_json:
        common.print_json(document)
        return
    report.print_report(document)
    made = f"pictures: {', '.join(map(str, pictures))}; " if pictures else ""
    print(f"{made}results: {out.with_suffix('.json')}")


@app.command("serve")
def serve(
    model: common.Model = "emoji-sd",
    clients: Annotated[int, typer.Option(help="Clients that ask at the same time.")] = 16,
    requests: Annotated[int, typer.Option(help="Requests of all clients.")] = 64,
    steps: Annotated[
        list[int] | None, typer.Option(help="Steps of a request, in turn (repeat). Default: 20 30.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Of the fixed batches, at most.")] = 8,
    capacity: Annotated[int, typer.Option(help="Pictures in flight in the service.")] = 16,
    repeats: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 3,
    guidance: common.Guidance = 7.5,
    seed: common.Seed = 0,
    as_json: common.Json = False,
) -> None:
    """A service for many clients against the plain pipeline one at a time and in fixed batches."""
    from sidestep.bench import serve as suite

    counts = steps or [20, 30]
    common.check_run(
        guidance=guidance, seed=seed, clients=clients, requests=requests, steps=min(counts),
        batch=batch, capacity=capacity, repeats=repeats,
    )  # fmt: skip
    document = suite.run(
        suite.Settings(
            model=model, clients=clients, requests=requests, steps=tuple(counts), batch=batch,
            capacity=capacity, guidance=guidance, seed=seed, repeats=repeats,
        )
    )  # fmt: skip
    if as_json:
        common.print_json(document)
        return
    suite.print_report(document)


@app.command("exits")
def exits(
    model: common.Model = "emoji-dit",
    exits: Annotated[
        Path | None,
        typer.Option(
            help="The file that `sidestep train exits` wrote. Default: the one in the model's "
            "folder."
        ),
    ] = None,
    faithful_model: Annotated[
        str | None, typer.Option(help="AdaDiff's folder, from train exits --mode faithful.")
    ] = None,
    faithful_exits: Annotated[Path | None, typer.Option(help="Its exits file.")] = None,
    prompts: Annotated[int, typer.Option(help="Novel prompts.")] = 64,
    solver: common.Solver = None,
    steps: Annotated[list[int] | None, typer.Option(help="Steps (repeat). Default: 10 20 50.")] = (
        None
    ),
    batch: Annotated[
        list[int] | None, typer.Option(help="Images a batch (repeat). Default: 1 8 32.")
    ] = None,
    subset: Annotated[
        int, typer.Option(help="First prompts, for all but the largest batch; at least one batch.")
    ] = 8,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods to measure, by commas: static,sample,... All if empty, but overhead: "
            "what a threshold of 0 costs."
        ),
    ] = "",
    threshold: Annotated[
        list[float] | None,
        typer.Option(help="Budgets of early exit (repeat). Default: 0.0125 to 0.2, doubling."),
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="Ask first what exits by sample could save at all.")
    ] = False,
    guidance: common.Guidance = 7.5,
    seed: common.Seed = 0,
    fresh: Fresh = False,
    out: common.Out = Path("sidestep-exits.png"),
    as_json: common.Json = False,
) -> None:
    """Early exit beside all else: blocks and seconds against PSNR and FD-small to the full model.

    Results are kept beside the chart, in a file of the same name ending in .json, after every
    method; what is there already is not measured again.
    """
    from sidestep.bench import exits as suite
    from sidestep.bench import exits_report as report
    from sidestep.bench.exits_grid import BUDGETS
    from sidestep.errors import UserError
    from sidestep.models import exits_of, load_prompts, spaced
    from sidestep.report.pictures import check_writable, save_figure

    counts, batches, budgets = steps or [10, 20, 50], batch or [1, 8, 32], threshold or BUDGETS
    common.check_run(
        guidance=guidance, seed=seed, prompts=prompts, subset=subset, steps=min(counts),
        batch=min(batches), threshold=min(budgets),
    )  # fmt: skip
    exits = exits or exits_of(model)
    if exits is None:
        raise UserError(f"--exits: expected a file, as the folder of {model} has none of its own")
    if (faithful_model is None) != (faithful_exits is None):
        raise UserError("--faithful-model and --faithful-exits: expected both or none")
    check_writable(out)
    document = suite.run(
        settings=suite.Settings(
            model=model, exits=exits, faithful=faithful_model, faithful_exits=faithful_exits,
            prompts=spaced(load_prompts("novel"), prompts), solver=solver,
            guidance=guidance, seed=seed, subset=subset, thresholds=sorted(set(budgets)),
        ),
        steps=sorted(set(counts)), batches=sorted(set(batches)),
        chosen=[name for name in methods.split(",") if name], with_gate=gate,
        state=out.with_suffix(".json"), fresh=fresh,
    )  # fmt: skip
    save_figure(report.chart(document), out)
    document["pictures"] = [str(out)]
    if as_json:
        common.print_json(document)
        return
    report.print_report(document)
    print(f"chart: {out}; results: {out.with_suffix('.json')}")


@app.command("all")
def every(
    only: Annotated[
        list[str] | None, typer.Option(help="One of those of --list (repeat). Default: all.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller ones: whether all works, not what it gives.")
    ] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Only say what would be run, and about how long.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="The folder to write into; docs/results to publish.")
    ] = (Path("sidestep-bench")),
    as_json: common.Json = False,
) -> None:
    """Measures everything that the README and the docs quote, one after the other: hours.

    One that fails does not stop the others; the exit code is 1 then.
    """
    from sidestep.bench import everything
    from sidestep.report.pictures import check_folder

    chosen = everything.choose(only or [])
    if listed:
        lines = [
            f"{suite.name}: about {everything.minutes(suite, quick):g} min, "
            f"{shlex.join(everything.command_of(suite, out, quick)[1:])}"
            for suite in chosen
        ]
        print("\n".join(lines))
        return
    check_folder(out)

    def tell(line: str) -> None:
        sys.stderr.write(f"bench all: {line}\n")

    document = everything.run(chosen, out, quick, tell)
    if as_json:
        common.print_json(document)
    failed = [result["name"] for result in document["results"] if result["failed"]]
    if failed:
        tell(f"{len(failed)} failed: {', '.join(failed)}")
        raise typer.Exit(1)
