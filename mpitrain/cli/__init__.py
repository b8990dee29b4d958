"""The command ``mpitrain``: what people type.  Each subcommand is a file that is loaded when it is called."""

from __future__ import annotations

import sys
import time
from importlib import import_module

import click

from mpitrain import __version__, _env
from mpitrain._errors import INTERRUPTED, LaunchError, MpitrainError
from mpitrain._names import did_you_mean

_COMMANDS = {
    "bench": "Measure collectives and training beside those of others, and jobs; tune.",
    "doctor": "Check this machine: Python, MPI, launcher, threads, shared memory, GPU.",
    "generate": "Let a trained model of text go on with a prompt.",
    "init": "Copy a job file and its sbatch file into this folder.",
    "predict": "Apply a trained model to new inputs.",
    "report": "Write the report of a run again.",
    "run": "Train: run a job file on one rank, on N, or under mpirun and srun.",
    "sweep": "Run a job over a grid of settings, each point on one rank.",
    "verify": "Show that a job on N ranks does what it does on one.",
}

_PATIENCE_S = 3.0


class _Lazy(click.Group):
    """A group whose commands are imported one at a time, so that ``--help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"mpitrain.cli.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"No such command {args[0]!r}. {did_you_mean(args[0], _COMMANDS)}".rstrip(), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mpitrain")
def cli() -> None:
    """Train models over MPI; the result does not depend on how it was parallelised."""


def main() -> None:
    """Run the command line; exit with 0, 2 for what the user can mend in the input, 1 else."""
    try:
        cli.main(prog_name="mpitrain", standalone_mode=False)
    except click.ClickException as error:
        if _speaks_first():
            error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(INTERRUPTED)
    except MpitrainError as error:
        if not isinstance(error, LaunchError) or _speaks_first():
            click.echo(f"mpitrain: error: {error}", err=True)
        sys.exit(error.exit_code)


def _speaks_first() -> bool:
    """Tell whether this process complains about how it was called, which all ranks of a launch find wrong alike.

    The others wait: launchers end all ranks, rank 0 perhaps before it has spoken, once the first has left.
    """
    if not _env.launched_rank():
        return True
    time.sleep(_PATIENCE_S)
    return False


__all__ = ["cli", "main"]
