"""What both benchmarks do with their figures: tables on standard output, JSON and a picture in files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import click
from rich.console import Console

from mpitrain import _env
from mpitrain.train.storage import disk

_PIPE_COLUMNS = 160


class Written(Protocol):
    """A report that can be kept in a file."""

    def to_json(self) -> bytes:
        """Return the file's content."""
        ...


R = TypeVar("R", bound=Written)


def writable(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before anything is measured; a callback of an option.

    Only rank 0 writes, so that the other ranks of a launch do not look: they may be on other nodes.
    """
    if path is not None and not _env.launched_rank() and not os.access(path.parent, os.W_OK):
        raise click.BadParameter(f"'{path.parent}' is no folder that can be written to; make it first", ctx, param)
    return path


def typed() -> tuple[str, ...]:
    """Return the command line, for the record, without where this program is installed."""
    return ("mpitrain", *sys.argv[1:])


def hand_out(
    report: R, show: Callable[[R, Console], object], draw: Callable[[R, Path], object],
    json_file: Path | None, plot_file: Path | None,
) -> None:  # fmt: skip
    """Print the tables, and write what was asked for."""
    terminal = sys.stdout.isatty() and _env.launched_size() is None
    show(report, Console(force_terminal=terminal, width=None if terminal else _PIPE_COLUMNS))
    if json_file:
        with disk("bench", json_file):
            json_file.write_bytes(report.to_json())
    if plot_file:
        with disk("bench", plot_file):
            draw(report, plot_file)
