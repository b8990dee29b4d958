"""What rank 0 shows while it trains: a progress bar on a terminal, plain lines elsewhere, nothing when quiet.

Everything goes to standard error; standard output belongs to the result.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from mpitrain.train import Observer

STYLES = ("auto", "bar", "lines", "none")


def show(value: float) -> str:
    """Format a number for people."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def headline(metrics: dict[str, Any]) -> str:
    """Return the metrics that are single numbers, in one line."""
    return "  ".join(f"{name} {show(value)}" for name, value in metrics.items() if isinstance(value, int | float))


class Silent(Observer):
    """Shows nothing, and leaves a note for the parent of where the run is kept, if there is one to read it."""

    def __init__(self, note: Path | None = None) -> None:
        self.note = note

    def on_kept(self, path: Path) -> None:
        """Leave the note."""
        if self.note is not None:
            with suppress(OSError):  # the parent may be on another node
                self.note.write_text(str(path))


class Lines(Silent):
    """A plain line per event, for files and pipes."""

    def __init__(self, console: Console, note: Path | None = None) -> None:
        super().__init__(note)
        self.console = console

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_start(self, title: str, steps: int, done: int) -> None:
        """Say what starts."""
        self.steps, self.done = steps, done
        self._say(title)

    def on_kept(self, path: Path) -> None:
        """Name the run's directory, as ``--resume`` takes it."""
        super().on_kept(path)
        self._say(f"kept in   {path}")

    def on_resumed(self, path: Path) -> None:
        """Say how far the run had come."""
        self._say(f"goes on   from step {self.done} of {self.steps} ({path.parent.name}/{path.name})")

    def on_metrics(self, record: dict[str, Any]) -> None:
        """Print one record of the metrics file."""
        shown = {k: v for k, v in record.items() if k not in ("kind", "step", "epoch", "seconds")}
        self._say(f"step {record['step']}/{self.steps}  {record['kind']:5}  {headline(shown)}")

    def on_note(self, text: str) -> None:
        """Print a remark."""
        self._say(text)


class Bar(Lines):
    """A progress bar with rate, remaining time and loss; evaluations scroll by above it."""

    def on_start(self, title: str, steps: int, done: int) -> None:
        """Draw the bar."""
        super().on_start(title, steps, done)
        self.progress = Progress(
            SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("steps  {task.fields[rate]}"),
            TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"), console=self.console,
        )  # fmt: skip
        self.progress.start()
        self.task: TaskID = self.progress.add_task("", total=steps, completed=done, rate="", loss="")

    def on_metrics(self, record: dict[str, Any]) -> None:
        """Move the bar; print evaluations above it."""
        if record["kind"] == "train":
            unit = "tokens" if "tokens_per_s" in record else "samples"
            rate = f"{record[f'{unit}_per_s']:,.0f} {unit}/s"
            self.progress.update(self.task, completed=record["step"], rate=rate, loss=f"loss {show(record['loss'])}")
        else:
            super().on_metrics(record)

    def on_end(self) -> None:
        """Take the bar down."""
        self.progress.stop()


def observer(style: str, width: int | None = None, note: Path | None = None) -> Observer:
    """Return the observer for rank 0.

    Parameters
    ----------
    style : {"auto", "bar", "lines", "none"}
        ``auto``: a bar if standard error is a terminal, else lines.
    width : int, optional
        Columns of the terminal, where a launcher stands between it and this process.
    note : Path, optional
        Where the parent looks for the run's directory, once training begins.
    """
    if style == "none":
        return Silent(note)
    forced = style == "bar" or None
    console = Console(stderr=True, force_terminal=forced, width=width)
    if style == "bar" or (style == "auto" and console.is_terminal):
        return Bar(console, note)
    return Lines(console, note)
