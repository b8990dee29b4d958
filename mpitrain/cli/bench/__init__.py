"""``mpitrain bench``: measure mpitrain on this machine, beside others or a job of one's own."""

from __future__ import annotations

import click

from mpitrain.cli.bench.collectives import collectives
from mpitrain.cli.bench.job import job
from mpitrain.cli.bench.training import training


@click.group("bench", short_help="Measure collectives and training beside those of others, and jobs; tune.")
def command() -> None:
    """Measure mpitrain on this machine, beside others or a job of one's own."""


command.add_command(collectives)
command.add_command(training)
command.add_command(job)

__all__ = ["command"]
