"""``mpitrain doctor``: look at this machine, alone or on every rank of a launch, and say what to mend."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpitrain import _env
from mpitrain.cli.checks import AFTER, BEFORE, PROBE
from mpitrain.cli.checks.finding import Finding, examine
from mpitrain.cli.checks.survey import take
from mpitrain.cli.checks.world import plural

_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
_STATUS_COLUMNS = max(map(len, _STYLES))
_LABEL_COLUMNS = max(len(what) for what, _ in (*BEFORE, *AFTER, *PROBE))
_PIPE_COLUMNS = 10_000  # where nothing wraps, each finding stays one line that grep can find


@click.command("doctor", short_help="Check this machine: Python, MPI, launcher, threads, shared memory, GPU.")
@click.option("--launch/--no-launch", default=True, show_default=True, help="Start two ranks, to prove that it works.")
@click.option("--probe-gpu", is_flag=True, help="Try whether MPI takes GPU memory; keep the verdict.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def command(launch: bool, probe_gpu: bool, as_json: bool) -> None:
    """Check what training over MPI needs, and say what to do where something is amiss.

    Alone it also starts two ranks; under mpirun or srun it looks at the ranks of that launch.  Ends with 1 if
    something is broken, with 0 if not.
    """
    checks = AFTER if launch else tuple(check for check in AFTER if check[0] != "launch")
    checks += PROBE if probe_gpu else ()
    speaks = _env.launched_rank() in (None, 0)
    printer = _Printer(silent=as_json or not speaks)
    findings = printer.show(examine(BEFORE)) if speaks else []
    survey = take()
    findings += printer.show(examine(checks, survey)) if speaks else []
    broken = survey.problem is not None or any(finding.status == "FAIL" for finding in findings)
    printer.close(findings)
    if speaks and as_json:
        click.echo(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]}))
    if survey.comm is not None:  # one exit code for all, and none leaves before rank 0 has printed
        broken = bool(survey.comm.allreduce(int(broken), "max"))
    sys.exit(int(broken))


class _Printer:
    """Prints findings as they come: in columns that wrap on a terminal, a line each elsewhere.

    Parameters
    ----------
    silent : bool
        Print nothing.
    """

    def __init__(self, silent: bool) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a locale that cannot print a path is among what is looked for
        # A launcher may give its ranks a terminal of its own while its output goes to a file.
        terminal = sys.stdout.isatty() and _env.launched_size() is None
        self._console = Console(quiet=silent, force_terminal=terminal, width=None if terminal else _PIPE_COLUMNS)

    def show(self, findings: Iterable[Finding]) -> list[Finding]:
        """Print each finding as soon as it is there; return them all."""
        shown = []
        with self._console.status("looking", spinner="line"):
            for finding in findings:
                self._console.print(self._row(finding), highlight=False)
                shown.append(finding)
        return shown

    def close(self, findings: list[Finding]) -> None:
        """Sum up."""
        count = Counter(finding.status for finding in findings)
        broken = f"{count['FAIL']} broken" if count["FAIL"] else "nothing is broken"
        self._console.print(f"{broken}, {plural(count['warn'], 'warning')}", highlight=False)

    def _row(self, finding: Finding) -> Table:
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=_STATUS_COLUMNS)
        row.add_column(width=_LABEL_COLUMNS)
        row.add_column(overflow="fold")
        text = Text(finding.found)
        if finding.remedy:
            text.append("\n-> " if self._console.is_terminal else " -> ").append(finding.remedy, style="cyan")
        row.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.what, text)
        return row
