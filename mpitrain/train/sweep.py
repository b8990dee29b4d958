"""A job over a grid of settings: each point is a serial run on one rank, whichever is free.

Every point has a run directory, named after its settings, below that of the sweep.  What is there says how far a point
got, so that a sweep that is started again goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any

from mpitrain._errors import JobError
from mpitrain.comm import Communicator, Outcome, agree, map_tasks
from mpitrain.comm.local import alone
from mpitrain.comm.threads import blas_threads
from mpitrain.train.job import Job
from mpitrain.train.job.file import read_value
from mpitrain.train.job.train import lower_is_better
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.session import differences, train_job
from mpitrain.train.storage import disk, write_atomic
from mpitrain.train.trainer import STOP_SIGNALS, NameSignal, own_name

_LONGEST_NAME = 120


@dataclass(frozen=True)
class Point:
    """One point of a grid.

    Parameters
    ----------
    settings : dict of str to object
        What it sets: the key of a job, and its value.
    text : str
        The resolved job file.
    directory : Path
        Of its run.
    """

    settings: dict[str, Any]
    text: str
    directory: Path

    @property
    def job(self) -> Job:
        """What to run."""
        return Job.from_toml(self.text, self.directory / "job.toml")

    @property
    def done(self) -> bool:
        """Whether this very job has run to its end."""
        run = RunDirectory(self.directory)
        return run.completed.is_file() and Job.load(run.job) == self.job


def parse_grid(grids: Iterable[str]) -> dict[str, list[Any]]:
    """Return the values of each key of ``key=value,value`` settings.

    Values are read as TOML, where commas in brackets and quotes belong to a value: ``model.hidden=[64],[128, 64]``;
    what is no TOML is a string: ``optimizer.kind=adam,sgd``.

    Raises
    ------
    JobError
        A setting has no ``=``, no value or no key, a value twice, or a key is there twice.
    """
    found: dict[str, list[Any]] = {}
    for grid in grids:
        key, _, text = (part.strip() for part in grid.partition("="))
        values = _values(text)
        distinct = {json.dumps(value, default=str) for value in values}
        if not key or key in found or not values or "" in values or len(distinct) < len(values):
            raise JobError(
                "cannot be understood", operation=f"--grid {grid}",
                expected="KEY=VALUE,VALUE, each key and value once, e.g. optimizer.lr=0.1,0.01",
            )  # fmt: skip
        found[key] = values
    return found


def _values(text: str) -> list[Any]:
    try:
        parsed: dict[str, list[Any]] = tomllib.loads(f"values = [{text}]")
        return parsed["values"]
    except ValueError:
        return [read_value(part.strip()) for part in text.split(",")]


def sweep_job(
    path: str | PathLike[str],
    overrides: Sequence[str],
    grid: Mapping[str, Sequence[Any]],
    comm: Communicator,
    directory: Path,
    on_point: Callable[[dict[str, Any]], object] | None = None,
    name_signal: NameSignal = own_name,
) -> dict[str, Any]:
    """Run a job at each point of a grid, each on one rank, and keep what came out.

    Parameters
    ----------
    path : path
        The job file.
    overrides : sequence of str
        Settings ``key=value`` of all points.
    grid : mapping of str to sequence
        The values of each key.
    comm : Communicator
        The ranks.
    directory : Path
        Of the sweep.  Points that are done there are not run again, those that are not go on.
    on_point : callable, optional
        Told the record of each point on rank 0 when it ends.
    name_signal : callable
        Names a signal that stops the sweep, for the summary.

    Returns
    -------
    dict
        What ``sweep.json`` holds: ``job, ranks, metric, sweep_dir, stopped``, the signal that ended it before its time
        or null, and ``points``, from the best to the worst by the job's metric (``train.checkpoint.best``, of the
        validation part if there is one).  Of each: ``settings, status`` (done, failed or stopped), ``value`` of the
        metric, ``metrics, steps, seconds, run_dir, error``, and the ``rank`` that ran it, or null if it was done
        before.  The same on all ranks.

    Raises
    ------
    JobError
        A point is no valid job, or the directory holds runs of another one; nothing has run then.
    StorageError
        A file cannot be written.

    Notes
    -----
    Collective.  A point that fails is a record.  A signal that asks for a stop saves and ends the points under way, and
    no other is begun.  The ranks share the file system.
    """
    points: list[Point] = []
    due: list[Point] = []
    with agree(comm):
        if comm.rank == 0:
            points = _plan(path, overrides, grid, directory.resolve())
            due = [point for point in points if not point.done]
    stop = Stop(name_signal)
    outcomes = _run(due, comm, on_point, stop)
    stopped = next(filter(None, comm.allgather_object(stop.by)), None)
    summary: dict[str, Any] = {}
    with agree(comm):
        if comm.rank == 0:
            summary = _summary(points, outcomes, comm.size, directory.resolve(), stopped)
            write_atomic(directory / "sweep.json", json.dumps(summary, indent=2).encode() + b"\n")
    found: dict[str, Any] = comm.broadcast_object(summary)
    return found


def _plan(
    path: str | PathLike[str], overrides: Sequence[str], grid: Mapping[str, Sequence[Any]], directory: Path
) -> list[Point]:  # fmt: skip
    """Return the points, all checked."""
    if not grid or not all(grid.values()):
        raise JobError("has no points", operation="sweep", got=dict(grid), expected="a value or more of each key")
    points = []
    for values in product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        texts = [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]
        job = Job.load(path, overrides, texts)
        point = Point(settings, job.to_toml(), directory / _name(settings))
        if changed := differences(job, point.directory) or _stretched(job, point.directory):
            raise JobError(
                "another job was run here", operation=f"sweep {point.directory}", got=changed,
                remedy="choose another directory with --sweep-dir",
            )  # fmt: skip
        points.append(point)
    with disk("make sweep directory", directory):
        directory.mkdir(parents=True, exist_ok=True)
    return points


def _stretched(job: Job, run: Path) -> str:
    """Return how a cosine that a point has begun would change with the length of the job, in words; empty if not.

    A run may go on for longer; but a point of a sweep is what one run of the job would leave.
    """
    path = run / "job.toml"
    if job.optimizer.schedule.kind != "cosine" or not path.is_file():
        return ""
    before, now = Job.load(path).train, job.train
    lengths = [(key, getattr(now, key), getattr(before, key)) for key in ("epochs", "steps")]
    changed = [f"train.{key} = {new!r}, the run has {old!r}" for key, new, old in lengths if new != old]
    return f"{'; '.join(changed)}, which its cosine schedule runs over" if changed else ""


def _name(settings: Mapping[str, Any]) -> str:
    """Return a directory's name that tells the settings, and no others."""
    whole = ",".join(f"{key}={value}" for key, value in sorted(settings.items()))
    name = re.sub(r"[^\w.+=,-]+", "", whole)[:_LONGEST_NAME]
    return name if name == whole else f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _run(
    points: list[Point], comm: Communicator, on_point: Callable[[dict[str, Any]], object] | None, stop: Stop
) -> dict[Path, Outcome]:  # fmt: skip
    """Run points on all ranks and return what became of each."""
    threads = blas_threads()

    def tell(outcome: Outcome) -> None:
        if on_point is not None:
            on_point(_record(outcome.item, outcome))

    with _stop_on_signals(stop):
        found = map_tasks(lambda point: _train(point, threads, stop), points, comm, on_outcome=tell)
    return {outcome.item.directory: outcome for outcome in found}


def _train(point: Point, threads: int, stop: Stop) -> None:
    """Train a point to its end, from where it was left."""
    if stop.by is not None:
        return
    run = RunDirectory(point.directory)
    begun = run.job.is_file()
    if not begun:
        _clean_up(run.path)
    train_job(
        point.job, alone(), run_dir=None if begun else run.path, resume=run.path if begun else None,
        blas_threads=threads, report=False, name_signal=stop.hear,
    )  # fmt: skip


def _clean_up(directory: Path) -> None:
    """Remove what a crash has left of a run that had not yet begun; nothing else is touched."""
    with disk("remove what a crash has left", directory):
        for name in ("data.json", "environment.json", "job.toml"):
            (directory / name).unlink(missing_ok=True)
            (directory / f".{name}.writing").unlink(missing_ok=True)


@dataclass
class Stop:
    """Whether this rank was asked to begin no other point, and by which signal."""

    name: NameSignal
    by: str | None = None

    def hear(self, number: signal.Signals) -> str:
        """Take note of a signal, and return its name."""
        self.by = self.name(number)
        return self.by


@contextmanager
def _stop_on_signals(stop: Stop) -> Iterator[None]:
    """Let the signals that stop a run stop the sweep between two runs; a second one does what it did before."""
    if threading.current_thread() is not threading.main_thread():  # which alone may, and no other is interrupted
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def ask(number: int, frame: object) -> None:
        stop.hear(signal.Signals(number))
        if number != signal.SIGUSR1:  # of which launchers may send two
            signal.signal(number, before[signal.Signals(number)])

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _record(point: Point, outcome: Outcome | None) -> dict[str, Any]:
    """Return what is to be told of a point, from its run directory."""
    run, error = RunDirectory(point.directory), outcome.error if outcome else None
    result = json.loads(run.result.read_text()) if error is None and run.result.is_file() else {}
    status = "failed" if error is not None else "done" if point.done else "stopped"
    metrics = result.get("metrics", {})
    return {
        "settings": point.settings,
        "status": status,
        "value": metrics.get(_metric(point)),
        "metrics": metrics,
        "steps": result.get("steps"),
        "seconds": result.get("seconds"),
        "rank": outcome.rank if outcome else None,
        "run_dir": str(point.directory),
        "error": error,
    }


def _metric(point: Point) -> str:
    job = point.job
    return f"{'valid' if job.data.valid else 'test'}_{job.train.checkpoint.best}"


def _summary(
    points: list[Point], outcomes: Mapping[Path, Outcome], ranks: int, directory: Path, stopped: str | None
) -> dict[str, Any]:
    metric = _metric(points[0])
    sign = 1 if lower_is_better(metric) else -1
    records = [_record(point, outcomes.get(point.directory)) for point in points]
    records.sort(key=lambda record: inf if record["value"] is None else sign * record["value"])
    told = {"job": points[0].job.name, "ranks": ranks, "metric": metric, "sweep_dir": str(directory)}
    cut_short = any(record["status"] == "stopped" for record in records)
    return {**told, "stopped": stopped if cut_short else None, "points": records}
