"""``mpitrain report``: write a run's report again."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report", short_help="Write the report of a run again.")
@click.argument("run", type=click.Path(path_type=Path))
def command(run: Path) -> None:
    """Write report.html and its pictures for the run directory RUN, also while it is still running.

    Once `mpitrain bench job RUN` has measured what the run's steps cost, the report tells that too.
    """
    from mpitrain.train.report import write_report

    click.echo(write_report(run))
