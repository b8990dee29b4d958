"""``mpitrain bench training``: what is asked for, who measures it, and where the results go."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mpitrain.cli.bench import plot, training_plot, training_tables
from mpitrain.cli.bench.outputs import hand_out, typed, writable
from mpitrain.cli.bench.start import start_ranks
from mpitrain.cli.run import check_no_launcher
from mpitrain.comm import abort_on_uncaught, leave_together, world
from mpitrain.train.bench.ranks import Spec, check, measure
from mpitrain.train.bench.tasks import TASKS


def _models(ctx: click.Context, param: click.Parameter, text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    try:
        check(found)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    return found


@click.command("training", short_help="Time training steps of every method against PyTorch DDP with gloo.")
@click.option("-n", "--ranks", type=click.IntRange(min=1), help="Start N ranks with the MPI library's own mpiexec.")
@click.option("--models", callback=_models, default=",".join(TASKS), show_default=True, metavar="NAME,…")
@click.option("--peers", is_flag=True, help="Also the same models in PyTorch: DDP with gloo, and mpitrain.torch.")
@click.option("--batch", type=click.IntRange(min=1), help="Samples a rank.  [default: each model's own]")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Turns of each contestant.")
@click.option("--round-s", type=click.FloatRange(min=0), default=0.15, show_default=True, help="Seconds of a turn.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), callback=writable,
              help="Write all figures here.")  # fmt: skip
@click.option("--plot", "plot_file", type=click.Path(path_type=Path, dir_okay=False), callback=writable,
              help="Draw them, e.g. as .png.")  # fmt: skip
def training(ranks: int | None, json_file: Path | None, plot_file: Path | None, **options: Any) -> None:
    """Time training steps: every method, serial runs side by side, and with --peers the same models in PyTorch.

    All take their steps in turn, in the same processes, with one BLAS thread a rank.  Without -n this is one rank, or
    one of those that mpirun or srun has started.
    """
    check_no_launcher(ranks)
    if plot_file is not None:
        plot.check(plot_file)
    if ranks is not None:
        sys.exit(start_ranks(ranks, _without_ranks(sys.argv[1:])))
    spec, comm = Spec(**options, command=typed()), world()
    abort_on_uncaught(comm)
    with leave_together(comm):
        report = measure(comm, spec)
        if comm.rank == 0:
            hand_out(report, training_tables.show, training_plot.draw, json_file, plot_file)
        comm.barrier()


def _without_ranks(words: list[str]) -> list[str]:
    """Return a command line without ``-n N``, in any of the forms that it may have."""
    left, skip = [], False
    for word in words:
        if skip or word in ("-n", "--ranks"):
            skip = not skip
        elif not (word.startswith("--ranks=") or (word.startswith("-n") and not word.startswith("--"))):
            left.append(word)
    return left
