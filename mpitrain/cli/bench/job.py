"""``mpitrain bench job``: what the steps of a job cost on its ranks, as a table or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

from mpitrain._errors import MissingExtraError
from mpitrain.cli.bench.outputs import hand_out, writable
from mpitrain.cli.bench.start import start_ranks
from mpitrain.cli.bench.training_tables import megabytes
from mpitrain.cli.run import check_job_file, check_no_launcher
from mpitrain.comm import abort_on_uncaught, leave_together, world
from mpitrain.train import Job, RunDirectory, load_job
from mpitrain.train.bench.costs import WORKSPACE, JobCosts
from mpitrain.train.bench.job import measure_job
from mpitrain.train.report import write_report
from mpitrain.train.storage import write_atomic


@click.command("job", short_help="Measure what a job's steps cost: time, operations, memory, communication.")
@click.argument("job")
@click.option("-n", "--ranks", type=click.IntRange(min=1), help="Start N ranks with the MPI library's own mpiexec.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. mesh.pipe=2.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Times that are taken.")
@click.option("--round-s", type=click.FloatRange(min=0), default=0.3, show_default=True, help="Seconds of each.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), callback=writable,
              help="Write all figures here.")  # fmt: skip
def job(
    job: str, ranks: int | None, overrides: tuple[str, ...], rounds: int, round_s: float, json_file: Path | None
) -> None:
    """Train the job in the file JOB for some seconds, and tell what a step costs; nothing of the training is kept.

    Told are samples and tokens a second, counted operations and what part of the ranks' own products they are, memory
    by kind, measured and predicted, the share of communication, and what a pipeline loses to filling and draining.
    Without -n this is one rank, or one of those that mpirun or srun has started.

    JOB may be the directory of a run: its report then tells the figures too, unless --set makes it another job.
    """
    check_no_launcher(ranks)
    run = RunDirectory(Path(job)) if Path(job).is_dir() else None
    file = str(run.job) if run else job
    check_job_file(file, ranks or 1)
    if ranks is not None:
        Job.load(file, overrides)  # a mistake in it ends here, in one line
        more = [f"--rounds={rounds}", f"--round-s={round_s}", *([f"--json={json_file}"] if json_file else [])]
        sys.exit(start_ranks(ranks, ["bench", "job", job, *(f"--set={each}" for each in overrides), *more]))
    comm = world()
    abort_on_uncaught(comm)
    with leave_together(comm):
        found = measure_job(load_job(file, overrides, comm), comm, rounds, round_s)
        if comm.rank == 0:
            hand_out(found, _show, lambda report, path: None, json_file, None)
            if run and not overrides:
                _keep(found, run)
        comm.barrier()


def _keep(found: JobCosts, run: RunDirectory) -> None:
    """Put the figures into a run's directory and report."""
    write_atomic(run.costs, found.to_json())
    try:
        click.echo(f"{'report':15}{write_report(run.path)}")
    except MissingExtraError as error:
        click.echo(f"no report: {error}")


def _show(found: JobCosts, console: Console) -> None:
    for line in lines(found):
        console.print(line, highlight=False, markup=False)


def lines(found: JobCosts) -> Iterator[str]:
    """Yield what was found, for people."""
    yield found.title
    for name, told in found.rows():
        yield f"{name:15}{told}"
    yield "memory         " + ", ".join(f"{kind} {megabytes(each)}" for kind, each in found.memory.items())
    yield f"               MB a rank, the mean: measured (predicted); {WORKSPACE}"
    yield from found.notes
