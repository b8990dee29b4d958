"""Measures a table: every candidate at every size, turn by turn, so that a drift of the machine meets all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm.algorithms import DEFAULT, names
from mpitrain.comm.timing import race
from mpitrain.comm.tuning.cache import chosen_transport, key_of, load
from mpitrain.comm.tuning.table import Row, Table

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

SIZES_BYTES: tuple[int, ...] = tuple(4**i for i in range(2, 14))
"""16 bytes to 64 MiB."""

OPERATIONS = ("allreduce", "reduce", "broadcast", "reduce_scatter", "allgather")
"""What has algorithms of our own."""

_MARGIN = 1.05  # how much faster than the default a candidate must be, lest noise chooses

_Trial = Callable[[str], object]


def measure(
    comm: Communicator,
    operations: Iterable[str] = OPERATIONS,
    sizes_bytes: Iterable[int] = SIZES_BYTES,
    rounds: int = 11,
    transport: str = "host",
) -> Table:
    """Time all candidates on a communicator and return the table of the fastest.

    Parameters
    ----------
    comm : Communicator
        On its ranks as they are placed now; the table holds for this layout.
    operations : iterable of str
        What to measure.
    sizes_bytes : iterable of int
        Of the whole array, float32; rounded up to one element per rank.
    rounds : int
        Each candidate is timed once per round, the order rotating; the median counts, and of each round the slowest
        rank.
    transport : str
        Under which name the table is kept.

    Returns
    -------
    Table
        The same on all ranks.

    Notes
    -----
    Collective.  Takes about ``rounds`` times the sum of all candidates' times.
    """
    rows = []
    for operation in operations:
        for elements in sorted({max(1, size // (4 * comm.size)) for size in sizes_bytes}):
            row = np.zeros(elements, np.float32)
            whole = np.zeros((comm.size, elements), np.float32)
            seconds = _race(comm, [DEFAULT, *names(operation)], _trial(comm, operation, row, whole), rounds)
            rows.append(Row(operation, comm.size, whole.nbytes, _fastest(seconds), seconds))
    return Table(key_of(comm, transport), tuple(rows))


def tune(comm: Communicator, operations: Iterable[str] = OPERATIONS, **how: Any) -> Table:
    """Measure the table that `mpitrain.world` will use on these ranks.

    Parameters
    ----------
    comm : Communicator
        The world's.
    operations : iterable of str
        What to measure; what the cache already holds of others is taken over.
    **how
        As for `measure`.

    Returns
    -------
    Table
        The same on all ranks; `save` keeps it.

    Notes
    -----
    Collective.
    """
    measured = tuple(operations)
    transport = chosen_transport()
    before = load(comm, transport).table
    table = measure(comm, measured, transport=transport, **how)
    others = (row for row in before.rows if row.operation not in measured) if before else ()
    return replace(table, rows=(*others, *table.rows))


def _trial(comm: Communicator, operation: str, row: Array, whole: Array) -> _Trial:
    """Return what performs an operation by an algorithm, in place."""
    trials: dict[str, _Trial] = {
        "allreduce": lambda name: comm.allreduce(whole, out=whole, algorithm=name),
        "reduce": lambda name: comm.reduce(whole, out=whole, algorithm=name),
        "broadcast": lambda name: comm.broadcast(whole, out=whole, algorithm=name),
        "reduce_scatter": lambda name: comm.reduce_scatter(whole, out=row, algorithm=name),
        "allgather": lambda name: comm.allgather(row, out=whole, algorithm=name),
    }
    return trials[operation]


def _race(comm: Communicator, candidates: list[str], trial: _Trial, rounds: int) -> dict[str, float]:
    """Return the median seconds of each candidate, after one round that is not counted."""
    contenders = [[partial(trial, name)] for name in candidates]
    race(comm, contenders, 1)
    seconds = race(comm, contenders, rounds)
    return dict(zip(candidates, np.median(seconds, axis=0).tolist(), strict=True))


def _fastest(seconds: dict[str, float]) -> str:
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] * _MARGIN < seconds[DEFAULT] else DEFAULT
