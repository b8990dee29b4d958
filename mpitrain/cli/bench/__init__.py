"""``mpitrain bench``: measure mpitrain beside others on this machine."""

from __future__ import annotations

import click

from mpitrain.cli.bench.collectives import collectives
from mpitrain.cli.bench.training import training


@click.group("bench", short_help="Measure collectives and training beside those of others; tune.")
def command() -> None:
    """Measure mpitrain beside others on this machine."""


command.add_command(collectives)
command.add_command(training)

__all__ = ["command"]
