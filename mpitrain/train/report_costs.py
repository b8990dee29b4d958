"""The part of a run's report on cost: rates that the run recorded, and what ``mpitrain bench job`` measured of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain.comm.bench.results import Quantiles
from mpitrain.train.bench.costs import WORKSPACE, JobCosts, told_rate
from mpitrain.train.bench.memory import Memory
from mpitrain.train.rundir import RunDirectory

_RATES = (("samples/s", "samples_per_s"), ("tokens/s", "tokens_per_s"))


def costs_part(run: RunDirectory, records: Iterable[Mapping[str, Any]], ranks: int | None) -> str:
    """Return it as HTML.

    Parameters
    ----------
    run : RunDirectory
        The run; figures of ``mpitrain bench job`` are those in its ``costs.json``, if there is one.
    records : iterable of mapping
        Its metrics.
    ranks : int, optional
        How many it had; None: not known yet.

    Raises
    ------
    InputError
        ``costs.json`` is something else.
    """
    found, rates = _read(run), _table(_rates(records))
    if found is None:
        start = f" -n {ranks}" if ranks else ""
        command = f"mpitrain bench job {shlex.quote(str(run.path))}{start}"
        missing = "Operations, utilisation, communication and memory, which training does not measure, of jobs on CPUs:"
        return f"{rates}<p>{missing} <code>{escape(command)}</code></p>"
    measured = f"<p>Measured by <code>mpitrain bench job</code>: {escape(found.title)}</p>"
    notes = "".join(f"<p>{escape(note)}</p>" for note in found.notes)
    return f"{rates}{measured}{_table(found.rows())}{_memory(found.memory)}{notes}"


def _read(run: RunDirectory) -> JobCosts | None:
    if not run.costs.exists():
        return None
    try:
        return JobCosts.from_json(run.costs.read_bytes())
    except (OSError, InputError) as error:
        raise InputError(
            f"{run.costs}: cannot be read", operation="report", got=str(error),
            remedy=f"remove it, or measure anew: mpitrain bench job {shlex.quote(str(run.path))}",
        ) from error  # fmt: skip


def _rates(records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield how fast training went, over all its records."""
    train = [each for each in records if each.get("kind") == "train"]
    for name, key in _RATES:
        values = [each[key] for each in train if isinstance(each.get(key), int | float)]
        if values:
            rate = Quantiles.of(np.array(values, np.float64))
            median, low, high = (told_rate(each) for each in (rate.p50, rate.p10, rate.p90))
            records_ = "1 record" if rate.count == 1 else f"{rate.count:,} records"
            yield name, f"{median} (p10 {low}, p90 {high}) over {records_} of the training"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(told)}</td></tr>" for name, told in rows)
    return f'<table class="facts">{cells}</table>' if cells else ""


def _memory(kinds: Mapping[str, Memory]) -> str:
    """Return a column for each kind of memory, and a row for what was measured and what predicted."""
    head = "".join(f"<th>{escape(kind)}</th>" for kind in kinds)
    measured = "".join(f"<td>{_megabytes(each.measured_bytes)}</td>" for each in kinds.values())
    predicted = "".join(f"<td>{_megabytes(each.predicted_bytes)}</td>" for each in kinds.values())
    return (
        f'<table class="facts memory"><tr><th>MB a rank</th>{head}</tr><tr><th>measured</th>{measured}</tr>'
        f"<tr><th>predicted</th>{predicted}</tr></table><p>The mean over the ranks; {WORKSPACE}</p>"
    )


def _megabytes(count: float | None) -> str:
    return "not known" if count is None else f"{count / 1e6:,.2f}"
