"""Which checkpoints a directory holds, which is the best, and which are removed.

Every change is a rename, so that a crash leaves each checkpoint either under its name and whole, or under a hidden
name that `clean_up` resolves.  One process at a time may change a directory; others may read.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from mpitrain._errors import CheckpointError
from mpitrain.train.checkpoint.manifest import MANIFEST, Best, Score, read_manifest
from mpitrain.train.storage import disk, sync_directory, write_atomic

_BEST = "best.json"
_NAME = re.compile(r"step-([0-9]{8,})")
_HIDDEN = re.compile(r"\.(step-[0-9]{8,})\.(writing|replaced|discarded)")


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def hidden(checkpoint: Path, state: Literal["writing", "replaced", "discarded"]) -> Path:
    """Return the name that a checkpoint has while it is not to be seen."""
    return checkpoint.with_name(f".{checkpoint.name}.{state}")


def checkpoints(directory: Path) -> tuple[Path, ...]:
    """Return the checkpoints of a directory, oldest first: those that have a manifest."""
    directory = Path(directory)
    with disk("list checkpoints", directory):
        entries = list(directory.iterdir()) if directory.is_dir() else []
        found = [path for path in entries if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return tuple(sorted(found, key=_step))


def latest(directory: Path) -> Path | None:
    """Return the newest checkpoint of a directory; None if there is none."""
    return next(reversed(checkpoints(directory)), None)


def best(directory: Path) -> Path | None:
    """Return the best checkpoint of a directory, as recorded there; None if none was scored.

    Raises
    ------
    CheckpointError
        The record is damaged, or names a checkpoint that is gone.
    """
    record = Path(directory) / _BEST
    try:
        found = Path(directory) / Best.model_validate_json(record.read_bytes()).checkpoint
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{record}: cannot be read", got=str(error).splitlines()[0],
            remedy="remove it: the next checkpoint writes it anew; or name the checkpoint that you want",
        ) from error  # fmt: skip
    if found not in checkpoints(directory):
        raise CheckpointError(f"{record}: names a checkpoint that is gone", got=found.name)
    return found


def publish(checkpoint: Path, on_phase: Callable[[str], None]) -> None:
    """Give a checkpoint that is on the disk under its hidden name its own, in place of one that may have had it."""
    with disk("write checkpoint", checkpoint):
        if checkpoint.exists():
            checkpoint.rename(hidden(checkpoint, "replaced"))
            on_phase("replaced")
        hidden(checkpoint, "writing").rename(checkpoint)
        sync_directory(checkpoint.parent)
    on_phase("renamed")
    clean_up(checkpoint.parent)


def record_best(directory: Path) -> Path | None:
    """Write down which checkpoint is best, and return it; None if none was scored.

    Found anew from the manifests each time, so that a crash between a checkpoint and this record loses nothing.
    """
    winner: tuple[Path, Score] | None = None
    for path in checkpoints(directory):
        score = _score(path)
        if score and score.beats(winner[1] if winner else None):
            winner = (path, score)
    record = directory / _BEST
    if winner is None:
        with disk("remove", record):
            record.unlink(missing_ok=True)
        return None
    text = Best(checkpoint=winner[0].name, score=winner[1]).model_dump_json(indent=2)
    write_atomic(record, text.encode() + b"\n")
    return winner[0]


def prune(written: Path, keep_last: int, on_phase: Callable[[str], None]) -> None:
    """Record the best checkpoint and remove all but that, the one just written, and the ``keep_last`` newest."""
    directory = written.parent
    kept = {record_best(directory), written, *checkpoints(directory)[-keep_last:]}
    on_phase("recorded")
    for path in checkpoints(directory):
        if path not in kept:
            _discard(path, on_phase)


def discard_after(directory: Path, step: int) -> None:
    """Remove the checkpoints of later steps: the run goes on from ``step``, and will write them anew."""
    for path in checkpoints(directory):
        if _step(path) > step:
            _discard(path, lambda phase: None)
    if Path(directory).is_dir():
        record_best(Path(directory))


def clean_up(directory: Path) -> None:
    """Resolve what a crash left behind: half-written and half-removed checkpoints go, a replaced one comes back.

    Raises
    ------
    StorageError
        The directory cannot be changed.
    """
    directory = Path(directory)
    with disk("clean up", directory):
        for path in list(directory.iterdir()) if directory.is_dir() else []:
            found = _HIDDEN.fullmatch(path.name)
            if not found:
                continue
            original = directory / found[1]
            if found[2] == "replaced" and not original.exists():
                path.rename(original)
            else:
                shutil.rmtree(path)


def _discard(path: Path, on_phase: Callable[[str], None]) -> None:
    with disk("remove checkpoint", path):
        gone = hidden(path, "discarded")
        path.rename(gone)
        on_phase("discarded")
        shutil.rmtree(gone)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _score(path: Path) -> Score | None:
    """Return a checkpoint's score; a damaged one has none, and is left for `load` to complain about."""
    try:
        return read_manifest(path).score
    except CheckpointError:
        return None
