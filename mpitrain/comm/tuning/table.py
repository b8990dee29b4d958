"""The table itself: what was measured where, what it chooses, and its form as JSON; it touches no file."""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from math import sqrt
from typing import Any

from mpitrain._errors import InputError
from mpitrain.comm import cache
from mpitrain.comm.algorithms import DEFAULT, names

_VERSION = 1


@dataclass(frozen=True)
class Key:
    """What a table holds for; it says nothing about any other.

    Parameters
    ----------
    machine : str
        The kinds of machine that the ranks run on.
    library : str
        What the MPI library calls itself.
    transport : str
        What carries the messages, e.g. ``host``.
    layout : str
        Ranks of each node, e.g. ``2x4+1x3``: two nodes of four, then one of three.
    """

    machine: str
    library: str
    transport: str
    layout: str

    def differences(self, other: Key) -> list[str]:
        """Say in which respects another key is not this one."""
        pairs = zip(asdict(self).items(), asdict(other).values(), strict=True)
        return [f"{name} {theirs!r}, here {ours!r}" for (name, ours), theirs in pairs if ours != theirs]


@dataclass(frozen=True)
class Row:
    """What was measured of one operation at one size.

    Parameters
    ----------
    operation : str
        E.g. ``allreduce``.
    size : int
        Ranks.
    total_bytes : int
        Of the whole array on each rank: what an allgather results in, what a reduce_scatter starts from.
    algorithm : str
        The choice: a name of `mpitrain.comm.algorithms`, or ``default``.
    seconds : mapping of str to float
        Median time of each candidate.
    """

    operation: str
    size: int
    total_bytes: int
    algorithm: str
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """The choices for one machine, library, transport and layout.

    Parameters
    ----------
    key : Key
        What it holds for.
    rows : tuple of Row
        What was measured.
    """

    key: Key
    rows: tuple[Row, ...]

    def choose(self, operation: str, total_bytes: int, size: int) -> str:
        """Return the algorithm of the row nearest in size; ``default`` where nothing was measured.

        Parameters
        ----------
        operation : str
            E.g. ``allreduce``.
        total_bytes : int
            Of the whole array, as in `Row`; the same on all ranks.
        size : int
            Ranks.
        """
        found = self._choices.get((operation, size))
        if found is None:
            return DEFAULT
        limits, algorithms = found
        return algorithms[bisect(limits, total_bytes)]

    @cached_property
    def _choices(self) -> dict[tuple[str, int], tuple[list[float], list[str]]]:
        """By operation and size: the choices in order of bytes, and where one ends; none where all are the default."""
        found = {key: _ranges(rows) for key, rows in self._groups().items()}
        return {key: ranges for key, ranges in found.items() if ranges[1] != [DEFAULT]}

    def _groups(self) -> dict[tuple[str, int], list[Row]]:
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.total_bytes):
            groups.setdefault((row.operation, row.size), []).append(row)
        return groups

    def describe(self) -> list[str]:
        """Return a line per operation that says which algorithm is chosen for which sizes."""
        lines = []
        for (operation, _), rows in self._groups().items():
            limits, algorithms = _ranges(rows)
            ends = [f" below {_size(limit)}" for limit in limits] + [" above" if limits else ""]
            words = (f"{name}{end}" for name, end in zip(algorithms, ends, strict=True))
            lines.append(f"{operation}: {', '.join(words)}")
        return lines

    def to_json(self) -> str:
        """Return the table as text for people and programs."""
        rows = [{**vars(row), "seconds": dict(row.seconds)} for row in self.rows]
        return json.dumps({"version": _VERSION, "key": asdict(self.key), "rows": rows}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Return the table that `to_json` wrote.

        Raises
        ------
        InputError
            The text is anything else: damaged, or of another version.
        """
        found = cache.parse(text, _VERSION, {"key": dict, "rows": list}, "tuning table")
        key = Key(**_typed(found["key"], {field.name: str for field in fields(Key)}, "the key"))
        return cls(key, tuple(_row(number, row) for number, row in enumerate(found["rows"])))


def _ranges(rows: list[Row]) -> tuple[list[float], list[str]]:
    """Return the choices in order of bytes, and the geometric means between the rows where they change."""
    limits: list[float] = []
    algorithms = [rows[0].algorithm]
    for one, two in pairwise(rows):
        if one.algorithm != two.algorithm:
            limits.append(sqrt(one.total_bytes * two.total_bytes))
            algorithms.append(two.algorithm)
    return limits, algorithms


def _size(count: float) -> str:
    """Return a number of bytes for people."""
    unit, name = next(((unit, name) for unit, name in ((2**20, "MiB"), (2**10, "KiB")) if count >= unit), (1, "bytes"))
    return f"{count / unit:.3g} {name}"


def _row(number: int, found: Any) -> Row:
    kinds = {"operation": str, "size": int, "total_bytes": int, "algorithm": str, "seconds": dict}
    row = Row(**_typed(found, kinds, f"row {number}"))
    _typed(row.seconds, dict.fromkeys(row.seconds, float), f"row {number}, seconds")
    known = [*names(row.operation), DEFAULT]
    if row.algorithm not in known:
        raise InputError(
            f"row {number} names no algorithm of {row.operation}", operation="tuning table", got=repr(row.algorithm),
            expected=", ".join(known),
        )  # fmt: skip
    return row


def _typed(found: Any, kinds: dict[str, type], part: str) -> dict[str, Any]:
    return cache.typed(found, kinds, part, "tuning table")
