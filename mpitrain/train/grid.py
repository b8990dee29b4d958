"""The points of a grid of settings: a job for each, and where its run is kept."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from os import PathLike
from pathlib import Path
from typing import Any

from mpitrain._errors import JobError
from mpitrain.train.job import Job
from mpitrain.train.job.file import read_value
from mpitrain.train.resumption import differences
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.storage import disk

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
        Its run directory.
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


def plan(
    path: str | PathLike[str], overrides: Sequence[str], grid: Mapping[str, Sequence[Any]], directory: Path
) -> list[Point]:  # fmt: skip
    """Return the points of a grid, all checked; makes the directory.

    Raises
    ------
    JobError
        A point is no valid job, points go by other metrics, or the directory holds runs of another job.
    """
    if not grid or not all(grid.values()):
        raise JobError("has no points", operation="sweep", got=dict(grid), expected="a value or more of each key")
    points: list[Point] = []
    metrics: set[str] = set()
    for values in product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        texts = [f"{key}={_toml(value)}" for key, value in settings.items()]
        job = Job.load(path, overrides, texts)
        point = Point(settings, job.to_toml(), directory / _name(settings))
        if changed := differences(job, point.directory):
            raise JobError(
                "another job was run here", operation=f"sweep {point.directory}", got=changed,
                remedy="choose another directory with --sweep-dir",
            )  # fmt: skip
        points.append(point)
        metrics.add(metric_of(job))
    _check_one(metrics)
    with disk("make sweep directory", directory):
        directory.mkdir(parents=True, exist_ok=True)
    return points


def _toml(value: Any) -> str:
    """Return a value as TOML, on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, default=str, ensure_ascii=False)  # TOML lacks JSON's pairs of escapes


def _check_one(metrics: set[str]) -> None:
    """Refuse points that cannot be sorted, for they go by different metrics."""
    if len(metrics) > 1:
        raise JobError(
            "its points go by different metrics, so that none is the best", operation="sweep",
            got=", ".join(sorted(metrics)),
            remedy="give all points a validation part, or none, and one train.checkpoint.best",
        )  # fmt: skip


def metric_of(job: Job) -> str:
    """Return the metric that the best of some runs of a job is told by."""
    return f"{'valid' if job.data.valid else 'test'}_{job.train.checkpoint.best}"


def _name(settings: Mapping[str, Any]) -> str:
    """Return a directory's name that tells the settings, and no others."""
    whole = ",".join(f"{key}={value}" for key, value in sorted(settings.items()))
    name = re.sub(r"[^\w.+=,-]+", "", whole)[:_LONGEST_NAME]
    return name if name == whole else f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
