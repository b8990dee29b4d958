"""The directory in which a run is kept: what was run, on what, how it went, and the checkpoints.

It knows names and formats of files, and nothing of training.  Rank 0 writes; the others only learn the path.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from mpitrain._errors import InputError, JobError, StorageError
from mpitrain.comm import Communicator
from mpitrain.comm.guard import agree
from mpitrain.train.checkpoint import clean_up, discard_after
from mpitrain.train.storage import disk, write_atomic


class RunDirectory:
    """The files of one run.  `create` makes one for all ranks; writing is for rank 0.

    Parameters
    ----------
    path : Path
        The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.job = self.path / "job.toml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"
        self.result = self.path / "result.json"
        self.trace = self.path / "trace.json"
        self.costs = self.path / "costs.json"
        self.completed = self.path / "COMPLETED"

    @classmethod
    def create(
        cls,
        comm: Communicator,
        name: str,
        *,
        path: Path | None = None,
        resume: Path | None = None,
        root: Path = Path("runs"),
    ) -> RunDirectory:
        """Make a directory for a new run, or open that of a run to go on with.

        Parameters
        ----------
        comm : Communicator
            All ranks of the run; they share the file system.
        name : str
            Of the job; without ``path`` the directory is ``root/name/<time>``, a new one however many jobs start at
            once.
        path : Path, optional
            The directory to use; missing or empty.
        resume : Path, optional
            The directory of the run to go on with; what a crash left half-written in it is cleaned up.
        root : Path
            Where the runs of all jobs lie.

        Raises
        ------
        JobError
            ``path`` holds something already, or ``resume`` holds no run.
        StorageError
            The directory cannot be made.

        Notes
        -----
        Collective over ``comm``: rank 0 makes the directory and broadcasts its path.
        """
        chosen = ""
        with agree(comm):
            if comm.rank == 0:
                found = _resumed(resume) if resume is not None else _given(path) if path else _new(root / name)
                chosen = str(found.resolve())
        return cls(Path(comm.broadcast_object(chosen)))

    def write_job(self, job: Mapping[str, Any]) -> None:
        """Keep the resolved job file."""
        write_atomic(self.job, tomli_w.dumps(job).encode())

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Keep what the run runs on from here; under ``earlier_starts``, first one first, what it ran on before."""
        before = self.read_environment()
        earlier = before.pop("earlier_starts", None)
        if before:
            starts = [*(earlier if isinstance(earlier, list) else []), before]
            environment = {**environment, "earlier_starts": starts}
        write_atomic(self.environment, _json(environment, indent=2))

    def read_environment(self) -> dict[str, Any]:
        """Return what the run ran on last; nothing if it was never said, or cannot be read."""
        try:
            found = json.loads(self.environment.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def read_fingerprint(self) -> dict[str, str]:
        """Return the fingerprint of where a reproducible run ran last; empty if none was kept, or it is damaged."""
        found = self.read_environment().get("fingerprint")
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
        return {}

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to the metrics; it is with the operating system when this returns.

        Parameters
        ----------
        record : mapping
            JSON values or NumPy scalars; ``step`` (int) and ``kind`` among them.  What is not finite becomes null.

        Raises
        ------
        StorageError
            The disk is full; the last line may be cut short, which readers know how to take.
        """
        line = _json(record)
        with disk("append metrics", self.metrics), self.metrics.open("ab", buffering=0) as file:
            if file.write(line) != len(line):
                raise StorageError(f"{self.metrics}: disk is full", operation="append metrics")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the metrics; a last one that a crash cut short is left out.

        Raises
        ------
        InputError
            A line before the last is damaged.
        """
        return [record for record, _ in self._lines()]

    def rewind(self, step: int) -> None:
        """Forget what came after ``step``: the run goes on from the checkpoint of that step.

        Metrics, checkpoints, the result and the mark of completion of later steps go, so that no step is there twice.
        """
        kept = b"".join(line for record, line in self._lines() if record["step"] <= step)
        if self.metrics.exists():
            write_atomic(self.metrics, kept)
        discard_after(self.checkpoints, step)
        for path in (self.completed, self.result):
            with disk("remove", path):
                path.unlink(missing_ok=True)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Keep the result, from which the report is made."""
        write_atomic(self.result, _json(result, indent=2))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Keep the result, then mark the run as completed."""
        self.write_result(result)
        write_atomic(self.completed, time.strftime("%Y-%m-%dT%H:%M:%S%z\n").encode())

    def _lines(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Give each record, and its line in bytes."""
        if not self.metrics.exists():
            return
        with disk("read metrics", self.metrics):
            lines = self.metrics.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            record = _record(line)
            if record is not None:
                yield record, line
            elif number < len(lines):
                raise InputError(f"{self.metrics}, line {number}: damaged", remedy="remove that line")


def _new(parent: Path) -> Path:
    """Make a directory named by the time; the file system decides between jobs that start in the same second."""
    with disk("make run directory", parent):
        parent.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path, number = parent / stamp, 1
        while True:
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
                path = parent / f"{stamp}-{number}"


def _given(path: Path) -> Path:
    with disk("make run directory", path):
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise JobError(
                f"{path}: run directory is not empty",
                operation="make run directory",
                remedy="resume the run that is in it, or choose another directory",
            )
    return path


def _resumed(path: Path) -> Path:
    if not RunDirectory(path).job.is_file():
        raise JobError(f"{path}: holds no run", operation="resume", remedy=_which_run(path))
    clean_up(RunDirectory(path).checkpoints)
    return path


def _which_run(path: Path) -> str:
    """Return what to name where a directory is no run: of those below or beside it the newest, if there are any."""
    remedy = "name the directory that has its job.toml"
    for parent in (path, path.parent):
        runs = [job.parent for job in parent.glob("*/job.toml")]
        if runs:
            return f"{remedy}; the newest in {parent} is {max(runs, key=lambda run: run.stat().st_mtime_ns)}"
    return remedy


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None if the line is not whole."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = line.endswith(b"\n") and isinstance(found, dict)
    return found if whole and type(found.get("step")) is int and isinstance(found.get("kind"), str) else None


def _json(document: Mapping[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(_plain(document), indent=indent, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Turn NumPy's numbers and arrays into Python's, and what JSON has no number for into None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
