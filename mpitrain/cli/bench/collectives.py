"""``mpitrain bench collectives``: what is asked for, who measures it, and where the results go."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from mpitrain import _env
from mpitrain._errors import LaunchError
from mpitrain.cli.bench import plot, tables
from mpitrain.cli.bench.campaign import Start, launcher, run_campaign
from mpitrain.cli.bench.outputs import hand_out, typed, writable
from mpitrain.cli.bench.start import start_ranks
from mpitrain.cli.checks.world import plural
from mpitrain.cli.run import check_no_launcher
from mpitrain.comm import Communicator, abort_on_uncaught, leave_together, tuning, world
from mpitrain.comm.bench.cases import VARIANTS
from mpitrain.comm.bench.components import DEFAULT, components
from mpitrain.comm.bench.ranks import chosen, measure
from mpitrain.comm.bench.results import Report
from mpitrain.comm.bench.spec import BUFFERS, DTYPES, OPERATIONS, Spec
from mpitrain.comm.launch import launch_command, library

SIZES = "4,64,1K,256K,1M,4M,16M,64M"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_TUNING_ROUNDS = 31


def _sizes(ctx: click.Context | None, param: click.Parameter | None, text: str | None) -> tuple[int, ...] | None:
    """Return numbers of bytes, given as ``4,1K,16M``, in order."""
    return None if text is None else tuple(sorted({_size(part, ctx, param) for part in text.split(",")}))


def _size(text: str, ctx: click.Context | None, param: click.Parameter | None) -> int:
    match = re.fullmatch(r"\s*(\d+)([KMG]?)\s*", text.upper())
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{text!r} is no size; expected bytes, e.g. {SIZES}", ctx, param)
    return int(match[1]) * _UNITS[match[2]]


def _names(known: Sequence[str]) -> Callable[[click.Context, click.Parameter, str | None], tuple[str, ...]]:
    """Return what splits names at commas and refuses any other than these."""

    def split(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...]:
        found = tuple(part.strip() for part in (text or "").split(",") if part.strip())
        unknown = [name for name in found if name not in known]
        if unknown:
            raise click.BadParameter(f"no {unknown[0]!r}; expected some of {', '.join(known)}", ctx, param)
        return tuple(dict.fromkeys(found))

    return split


_VARIANTS = tuple(dict.fromkeys(variant.name for variant in VARIANTS))


@click.command("collectives", short_help="Time every collective, transport and algorithm against raw mpi4py.")
@click.option("-n", "--ranks", type=click.IntRange(min=1), help="Start N ranks with the MPI library's own mpiexec.")
@click.option(
    "--launcher", "command", metavar="COMMAND", help="Start them by this, e.g. 'mpiexec --hostfile hosts -n 8'."
)
@click.option("--sizes", callback=_sizes, metavar="BYTES,…", help=f"Of the whole array.  [default: {SIZES}]")
@click.option("--operations", callback=_names(OPERATIONS), metavar="NAME,…", help="[default: all that are measured]")
@click.option(
    "--variants", callback=_names(_VARIANTS), metavar="NAME,…", help="Only these ways to call, as the tables name them."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), help="Turns of each race.  [default: what fits into --time-s]")
@click.option("--time-s", type=click.FloatRange(min=0.001), default=0.2, show_default=True, help="Of each race.")
@click.option("--buffers", type=click.Choice(BUFFERS), default="resident", show_default=True,
              help="Use the same arrays each time, or more of them than the last cache holds.")  # fmt: skip
@click.option("--peers", is_flag=True, help="Also against the MPI library's own components and PyTorch's gloo.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Repeat all launches.")
@click.option("--limit-s", type=click.FloatRange(min=1), default=900.0, show_default=True, help="Of each launch.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), callback=writable,
              help="Write all figures here.")  # fmt: skip
@click.option("--plot", "plot_file", type=click.Path(path_type=Path, dir_okay=False), callback=writable,
              help="Draw them, e.g. as .png.")  # fmt: skip
@click.option("--tune", is_flag=True, help="Instead: find the fastest algorithms, and keep them for this machine.")
def collectives(ranks: int | None, command: str | None, tune: bool, **options: Any) -> None:
    """Time every collective, transport and algorithm of mpitrain's against raw mpi4py.

    Without -n or --launcher this is one rank, or one of those that mpirun or srun has started.  With --tune,
    `mpitrain.world()` uses what was found in every later program on this machine, MPI library and layout of ranks.
    """
    check_no_launcher(ranks)
    if options["plot_file"] is not None:
        plot.check(options["plot_file"])
    start = _start_of(ranks, command, tune)
    if tune:
        _tune(ranks, options)
    elif start is None:
        _measure_here(options)
    else:
        _measure_launched(start, options)


def _start_of(ranks: int | None, command: str | None, tune: bool) -> Start | None:
    """Return what starts ranks; None if this process is one itself."""
    if command is None:
        return None if ranks is None else partial(launch_command, ranks)
    words, launched = shlex.split(command), _env.launched_size()
    if ranks is not None or not words:
        raise click.UsageError("--launcher is the whole command that starts ranks, its -n included.")
    if tune or (launched and launched[1] > 1):
        raise click.UsageError(f"--launcher starts launches to compare; here: {command} mpitrain bench collectives …")
    if shutil.which(words[0]) is None:
        raise click.UsageError(f"--launcher: there is no command {words[0]!r} on this machine.")
    return lambda argv: ([*words, *argv], _env.snapshot())


def _spec(options: dict[str, Any]) -> Spec:
    taken = {name: options[name] for name in ("dtype", "repeats", "time_s", "buffers")}
    spec = Spec(
        options["sizes"] or _sizes(None, None, SIZES) or (), options["operations"] or OPERATIONS, **taken,
        variants=options["variants"], gloo=options["peers"], command=typed(),
    )  # fmt: skip
    if not chosen(spec):
        raise click.UsageError(f"none of --variants is a way to call {' or '.join(spec.operations)}")
    return spec


def _measure_launched(start: Start, options: dict[str, Any]) -> None:
    """Start a campaign of launches from this process, which is no rank."""
    spec = _spec(options)
    found = components(library().kind) if options["peers"] else (DEFAULT,)
    launch = launcher(start, spec, options["limit_s"])
    launches, failures = run_campaign(found, options["rounds"], launch, lambda text: click.echo(text, err=True))
    if not any(each.component == DEFAULT.name for each in launches):
        raise LaunchError("nothing was measured", operation="bench", got="; ".join(failures), remedy="mpitrain doctor")
    hand_out(
        Report([*spec.command], launches, failures), tables.show, plot.draw, options["json_file"], options["plot_file"]
    )


def _measure_here(options: dict[str, Any]) -> None:
    """Measure as one rank of the world; rank 0 tells."""
    spec = _spec(options)
    comm = _join()
    with leave_together(comm):
        failures = ["the MPI library's components: each needs launches of its own; give -n N, or --launcher '…'"]
        launch = measure(comm, spec)
        if comm.rank == 0:
            report = Report([*spec.command], [launch], failures if options["peers"] else [])
            hand_out(report, tables.show, plot.draw, options["json_file"], options["plot_file"])
        comm.barrier()


def _join() -> Communicator:
    comm = world()
    abort_on_uncaught(comm)
    return comm


def _tune(ranks: int | None, options: dict[str, Any]) -> None:
    if ranks is None:
        _tune_here(options)
    else:
        sys.exit(start_ranks(ranks, ["bench", "collectives", *_tuning_arguments(options)]))


def _tuning_arguments(options: dict[str, Any]) -> list[str]:
    given = {
        "--sizes": ",".join(map(str, options["sizes"] or ())),
        "--operations": ",".join(options["operations"] or ()),
        "--repeats": options["repeats"],
    }
    return ["--tune", *(f"{name}={value}" for name, value in given.items() if value)]


def _tune_here(options: dict[str, Any]) -> None:
    """Measure all algorithms as one rank of the world, and keep the table."""
    comm = _join()
    with leave_together(comm):
        wishes = {"operations": options["operations"], "sizes_bytes": options["sizes"]}
        table = tuning.tune(
            comm, rounds=options["repeats"] or _TUNING_ROUNDS, **{name: wish for name, wish in wishes.items() if wish}
        )
        if comm.rank == 0:
            path = tuning.save(table)
            click.echo(f"{plural(comm.size, 'rank')}, layout {table.key.layout}, {table.key.library}")
            for line in table.describe():
                click.echo(f"  {line}")
            click.echo(f"kept in {path}; mpitrain.world() uses it from now on, MPITRAIN_TUNING=off does without")
        comm.barrier()
