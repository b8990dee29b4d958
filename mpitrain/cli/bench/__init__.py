"""``mpitrain bench``: measure mpitrain beside others on this machine."""

from __future__ import annotations

import click

from mpitrain.cli.bench.collectives import collectives


@click.group("bench", short_help="Measure the collectives beside those of others, and tune them.")
def command() -> None:
    """Measure mpitrain beside others on this machine."""


command.add_command(collectives)

__all__ = ["command"]
