"""Gathers rows of an array, and names rows of an array that is too large to copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array, DType, Shape


@dataclass(frozen=True, eq=False)
class Selection:
    """Some rows of a memory-mapped array, in any order, none of them loaded before it is asked for.

    Parameters
    ----------
    base : array, shape (m, …)
        Where the rows are.
    indices : array of int64, shape (n,)
        Which rows.
    """

    base: Array
    indices: Array

    @property
    def shape(self) -> Shape:
        """Shape of the selection: (n, …)."""
        return (len(self.indices), *self.base.shape[1:])

    @property
    def dtype(self) -> DType:
        """Element type of the array."""
        return self.base.dtype

    @property
    def ndim(self) -> int:
        """Number of axes, that of the rows included."""
        return self.base.ndim

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: slice | int | Array) -> Array:
        """Load rows: ``selection[3:7]``."""
        found: Array = self.base[self.indices[key]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Load all rows."""
        return np.asarray(gather(self.base, self.indices), dtype)


Rows: TypeAlias = Array | Selection
"""An array in memory, a memory-mapped one, or some rows of one."""


def check_rows(name: str, indices: object, rows: int) -> Array:
    """Return ``indices`` as int64, shape (k,), if each is the number of one of ``rows`` rows.

    Raises
    ------
    InputError
        They are no integers (a mask, say), or one is negative or too large: NumPy would take other rows for them.
    """
    found = np.asarray(indices)
    if found.shape != (0,) and (found.ndim != 1 or found.dtype.kind not in "iu"):
        remedy = "numpy.flatnonzero(mask) gives the numbers of a mask's rows" if found.dtype.kind == "b" else None
        got = f"{found.dtype} of shape {found.shape}"
        raise InputError(f"{name}: not numbers of rows", got=got, expected="integers of shape (k,)", remedy=remedy)
    wrong = np.flatnonzero((found < 0) | (found >= rows))
    if wrong.size:
        got, expected = found[wrong[0]], f"0 to {rows - 1}" if rows else "none of an empty data set"
        raise InputError(f"{name}: no such row", got=got, expected=expected)
    return found.astype(np.int64, copy=False)


def overlap_of(indices: Array, overlap: int) -> int:
    """Return with how many of the rows that follow it one of the rows ``indices`` may share values.

    Parameters
    ----------
    indices : array of int64, shape (k,)
        Which rows are left.
    overlap : int
        The same of all rows.
    """
    if not overlap:
        return 0
    ordered = np.sort(indices)
    shared = np.searchsorted(ordered, ordered + overlap, side="right") - np.arange(1, len(ordered) + 1)
    if not shared.any():
        return 0
    return int(shared.max()) if (ordered == indices).all() else len(indices) - 1


def gather(array: Rows, indices: Array) -> Array:
    """Return the rows ``indices`` of ``array``, in that order, as a new array in memory.

    Notes
    -----
    A memory map is read from front to back, so that each of its pages is touched once.
    """
    if isinstance(array, Selection):
        return gather(array.base, array.indices[indices])
    if not isinstance(array, np.memmap):  # of an array that is not contiguous, such as windows, `take` makes a copy
        return array.take(indices, axis=0) if array.flags.c_contiguous else array[indices]
    order = np.argsort(indices, kind="stable")
    found = np.empty((len(indices), *array.shape[1:]), array.dtype)
    found[order] = array[indices[order]]
    return found


def part(array: Rows, rows: slice) -> Rows:
    """Return a view of some rows that are evenly spaced."""
    return Selection(array.base, array.indices[rows]) if isinstance(array, Selection) else array[rows]


def select(array: Rows, indices: Array) -> Rows:
    """Return the rows ``indices`` of ``array``: a copy where that is cheap, else a `Selection`.

    Memory maps and overlapping windows (a view whose copy would be many times its size) are not copied.
    """
    if isinstance(array, Selection):
        return Selection(array.base, array.indices[indices])
    if isinstance(array, np.memmap) or not array.flags.c_contiguous:
        return Selection(array, indices)
    return gather(array, indices)
