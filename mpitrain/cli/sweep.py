"""``mpitrain sweep``: a job over a grid of settings, one serial run per point, farmed over the ranks."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpitrain import _env
from mpitrain._errors import INTERRUPTED
from mpitrain.cli.display import show
from mpitrain.cli.run import check_job_file, check_no_launcher, launch, sender, take_part

if TYPE_CHECKING:
    from mpitrain.comm import Communicator

_PLAIN_WIDTH = 100


@click.command("sweep", short_help="Run a job over a grid of settings, each point on one rank.")
@click.argument("job")
@click.option("-n", "--ranks", type=click.IntRange(min=1), help="Start N ranks with the MPI library's own mpiexec.")
@click.option(
    "--grid", "grids", multiple=True, required=True, metavar="KEY=VALUE,VALUE",
    help="Values of a key, e.g. optimizer.lr=0.1,0.01; of a key of lists, model.hidden=[64],[128,64].",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key at all points.")
@click.option("--sweep-dir", type=click.Path(path_type=Path), help="Where the sweep is kept  [default: sweeps/NAME]")
@click.option("--quiet", is_flag=True, help="Show nothing until the end.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@click.option("--width", type=int, hidden=True, help="Columns of the terminal that the launcher hides; 0: none.")
@click.option("--exit-code", type=click.Path(path_type=Path), hidden=True, help="File that takes the exit code.")
def command(ranks: int | None, exit_code: Path | None, **options: Any) -> None:
    """Run what the file JOB (TOML) says at every point of a grid, and compare the results.

    Each point is a serial run with a run directory of its own; the ranks take them one by one.  A point that fails is
    told at the end, with exit code 1, and the others are kept.  Started again, a sweep goes on with what is not done.
    """
    from mpitrain.train import Job
    from mpitrain.train.grid import parse_grid

    check_no_launcher(ranks)
    check_job_file(options["job"], ranks or 1)
    parse_grid(options["grids"])
    if ranks is None or ranks == 1:
        take_part(exit_code, lambda comm: _sweep(comm, name_signal=sender(exit_code), **options))
    else:
        Job.load(options["job"], options["overrides"])  # a mistake in it ends here, in one line
        sys.exit(launch(ranks, ["sweep", *_arguments(options)]))


def _arguments(options: dict[str, Any]) -> list[str]:
    found = [options["job"], *(f"--grid={grid}" for grid in options["grids"])]
    found += [f"--set={override}" for override in options["overrides"]]
    found += [f"--sweep-dir={options['sweep_dir']}"] if options["sweep_dir"] else []
    found += [flag for flag, name in (("--json", "as_json"), ("--quiet", "quiet")) if options[name]]
    return [*found, f"--width={shutil.get_terminal_size().columns if sys.stdout.isatty() else 0}"]


def _sweep(
    comm: Communicator, job: str, grids: tuple[str, ...], overrides: tuple[str, ...], sweep_dir: Path | None,
    quiet: bool, as_json: bool, width: int | None, name_signal: Callable[[signal.Signals], str],
) -> int:  # fmt: skip
    from mpitrain.train import load_job
    from mpitrain.train.grid import parse_grid
    from mpitrain.train.sweep import sweep_job

    directory = sweep_dir or Path("sweeps") / load_job(job, overrides, comm).name
    found = sweep_job(job, overrides, parse_grid(grids), comm, directory, None if quiet else _tell, name_signal)
    if comm.rank == 0:
        if as_json:
            click.echo(json.dumps(found))
        else:
            _print_table(found, width)
    if found["stopped"] == signal.SIGINT.name:
        return INTERRUPTED
    return int(any(point["status"] == "failed" for point in found["points"]))


def _tell(point: dict[str, Any]) -> None:
    """Say how a point ended, on standard error."""
    what = _brief(point["error"]) if point["error"] else "  ".join(_numbers(point["metrics"]))
    click.echo(f"{_settings(point)}  {point['status']} on rank {point['rank']}  {what}", err=True)


def _numbers(metrics: dict[str, Any]) -> list[str]:
    return [f"{name} {'-' if value is None else show(value)}" for name, value in metrics.items()]


def _settings(point: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in point["settings"].items())


def _brief(error: str) -> str:
    """Return the line of an error that says most: the last one of a traceback."""
    return error.splitlines()[-1]


def _print_table(found: dict[str, Any], width: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    points = found["points"]
    title = f"{found['job']}: {len(points)} points, by {found['metric']}"
    table = Table(title=title, title_justify="left")
    for name in (*points[0]["settings"], found["metric"], "steps", "seconds", "status"):
        table.add_column(name, justify="left" if name == "status" else "right")
    for point in points:
        values = [str(value) for value in point["settings"].values()]
        numbers = ["-" if point[key] is None else show(point[key]) for key in ("value", "steps", "seconds")]
        table.add_row(*values, *numbers, point["status"])
    if width is None and _env.launched_rank() is None and sys.stdout.isatty():
        Console().print(table)
    else:  # launchers give their ranks terminals that nobody sees
        Console(width=width or _PLAIN_WIDTH, force_terminal=bool(width)).print(table)
    if found["stopped"]:
        click.echo(f"stopped   by {found['stopped']}")
    for point in points:
        if point["error"]:
            click.echo(f"failed    {_settings(point)}: {_brief(point['error'])}")
    click.echo(f"kept in   {found['sweep_dir']}")
    if any(point["status"] != "done" for point in points):
        click.echo("go on     the same command runs again what is not done")
