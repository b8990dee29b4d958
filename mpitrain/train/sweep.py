"""A job over a grid of settings: each point is a serial run on one rank, whichever is free.

Every point has a run directory, named after its settings, below that of the sweep.  What is there says how far a point
got, so that a sweep that is started again goes on.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any

from mpitrain._errors import InputError
from mpitrain.comm import Communicator, Outcome, agree, map_tasks
from mpitrain.comm.local import alone
from mpitrain.comm.threads import blas_threads
from mpitrain.train import storage
from mpitrain.train.grid import Point, metric_of, plan
from mpitrain.train.job.train import lower_is_better
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.session import train_job
from mpitrain.train.signals import NameSignal, own_name, stop_on_signals
from mpitrain.train.storage import disk, write_atomic


def sweep_job(
    path: str | PathLike[str],
    overrides: Sequence[str],
    grid: Mapping[str, Sequence[Any]],
    comm: Communicator,
    directory: str | PathLike[str],
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
    directory : path
        Where the sweep is kept.  Points that are done there are not run again, and unfinished ones go on.
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
        A point is no valid job, points go by other metrics, or the directory holds runs of another job; nothing has run
        then.
    InputError
        The result of a point that is done is damaged; nothing has run then.
    StorageError
        A file cannot be written.

    Notes
    -----
    Collective.  A point that fails is a record.  A signal that asks for a stop saves and ends the points under way, and
    no other is begun.  The ranks share the file system.
    """
    kept = Path(directory).resolve()
    points: list[Point] = []
    due: list[Point] = []
    with agree(comm):
        if comm.rank == 0:
            points = plan(path, overrides, grid, kept)
            due = [point for point in points if not point.done]
            for point in points:
                if point not in due:
                    _result(RunDirectory(point.directory).result)  # damage is said before hours of work, not after
    stop = Stop(name_signal)
    outcomes = _run(due, comm, on_point, stop)
    stopped = next(filter(None, comm.allgather_object(stop.by)), None)
    summary: dict[str, Any] = {}
    with agree(comm):
        if comm.rank == 0:
            summary = _summary(points, outcomes, comm.size, kept, stopped)
            write_atomic(kept / "sweep.json", json.dumps(summary, indent=2).encode() + b"\n")
    found: dict[str, Any] = comm.broadcast_object(summary)
    return found


def _run(
    points: list[Point], comm: Communicator, on_point: Callable[[dict[str, Any]], object] | None, stop: Stop
) -> dict[Path, Outcome]:  # fmt: skip
    """Run points on all ranks and return what became of each."""
    threads = blas_threads()

    def tell(outcome: Outcome) -> None:
        if on_point is not None:
            on_point(_record(outcome.item, outcome))

    with stop_on_signals(stop.hear):
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
    if not directory.is_dir():
        return
    with storage.alone(directory), disk("remove what a crash has left", directory):
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


def _record(point: Point, outcome: Outcome | None) -> dict[str, Any]:
    """Return what is to be told of a point, from its run directory."""
    run, error = RunDirectory(point.directory), outcome.error if outcome else None
    result = _result(run.result) if error is None else {}
    status = "failed" if error is not None else "done" if point.done else "stopped"
    metrics = result.get("metrics", {})
    return {
        "settings": point.settings,
        "status": status,
        "value": metrics.get(metric_of(point.job)),
        "metrics": metrics,
        "steps": result.get("steps"),
        "seconds": result.get("seconds"),
        "rank": outcome.rank if outcome else None,
        "run_dir": str(point.directory),
        "error": error,
    }


def _result(path: Path) -> dict[str, Any]:
    """Return the result of a run; empty if there is none yet."""
    if not path.is_file():
        return {}
    with disk("read result", path):
        text = path.read_bytes()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not (isinstance(found, dict) and isinstance(found.get("metrics", {}), dict)):
        raise InputError(
            f"{path}: damaged", operation="sweep", remedy=f"remove {path.parent}, and the same command runs it again"
        )
    return found


def _summary(
    points: list[Point], outcomes: Mapping[Path, Outcome], ranks: int, directory: Path, stopped: str | None
) -> dict[str, Any]:
    metric = metric_of(points[0].job)
    sign = 1 if lower_is_better(metric) else -1
    records = [_record(point, outcomes.get(point.directory)) for point in points]
    records.sort(key=lambda record: inf if record["value"] is None else sign * record["value"])
    told = {"job": points[0].job.name, "ranks": ranks, "metric": metric, "sweep_dir": str(directory)}
    cut_short = any(record["status"] == "stopped" for record in records)
    return {**told, "stopped": stopped if cut_short else None, "points": records}
