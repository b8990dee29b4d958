"""Who watches a run: what the command line's progress bar implements, and research code may."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Observer:
    """Told what happens, on the rank that it was given to; does nothing of its own."""

    def on_start(self, title: str, steps: int, done: int) -> None:
        """Training begins: a line that says what, the last step, and how many were done before."""

    def on_kept(self, path: Path) -> None:
        """Say right after the start where the run is kept: whatever ends it, it goes on from there."""

    def on_resumed(self, path: Path) -> None:
        """Say after that from which checkpoint a run goes on."""

    def on_metrics(self, record: dict[str, Any]) -> None:
        """Take a record of the metrics file: ``kind`` (train, valid, test), ``step``, ``loss`` …."""

    def on_note(self, text: str) -> None:
        """Something that a person should know."""

    def on_end(self) -> None:
        """Training has ended, well or not."""
