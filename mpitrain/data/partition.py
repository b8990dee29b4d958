"""Which rank owns which row of a data set.

Each way is a pure function, the same on every rank, that gives each row exactly one owner; a part may be empty.  Where
gradients are reduced at every step, owners decide where the work is done, and not what comes out of training.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._options import check_whole, choose
from mpitrain._typing import Array
from mpitrain.arrays import Key
from mpitrain.data.dataset import Dataset, check_dataset
from mpitrain.data.options import call
from mpitrain.data.shares import apportion, share_sizes


def block(rows: int, parts: int) -> Array:
    """Give each part a contiguous run of rows, near-equal in size: 7 rows in 3 parts are 3, 2 and 2."""
    return _runs(share_sizes(rows, parts))


def random(rows: int, parts: int, seed: int) -> Array:
    """Give each part random rows, near-equally many."""
    owner = np.empty(rows, np.int32)
    owner[Key(seed, "partition").permutation(rows)] = block(rows, parts)
    return owner


def by_feature(values: Array, parts: int) -> Array:
    """Keep rows that share a value together.

    Parameters
    ----------
    values : array, shape (n,)
        A feature or the labels.
    parts : int
        Number of parts; those beyond the number of distinct values stay empty.

    Notes
    -----
    The largest group goes first, each to the part that has the fewest rows so far (Graham, "Bounds on multiprocessing
    timing anomalies", 1969: at most 4/3 of the best possible maximum).  Of equal groups the smaller value goes first,
    of equal parts the lower number.
    """
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    loads = [(0, part) for part in range(parts)]
    part_of_group = np.empty(len(sizes), np.int32)
    for number in np.argsort(-sizes, kind="stable"):
        load, part = loads[0]
        part_of_group[number] = part
        heapq.heapreplace(loads, (load + int(sizes[number]), part))
    owner: Array = part_of_group[group]
    return owner


def weighted(rows: int, parts: int, capacities: Sequence[float] | Array) -> Array:
    """Give each part a contiguous run of rows in proportion to its capacity, by the largest remainder.

    Raises
    ------
    InputError
        There is not one capacity for each part, one is negative or not finite, or all are zero.
    """
    try:
        given = np.asarray(capacities, np.float64)
    except (TypeError, ValueError):  # not numbers: as unusable as a wrong shape
        given = np.empty(0)
    if given.shape != (parts,) or not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise InputError(
            "weighted partition: unusable capacities", got=capacities,
            expected=f"{parts} numbers, one a rank, not negative and not all zero",
        )  # fmt: skip
    return _runs(apportion(rows, given))


def _runs(sizes: Array) -> Array:
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


PARTITIONS: dict[str, Callable[..., Array]] = {
    "block": lambda dataset, parts, seed: block(len(dataset), parts),
    "by_feature": lambda dataset, parts, seed, *, feature=None: by_feature(dataset.column(feature), parts),
    "random": lambda dataset, parts, seed: random(len(dataset), parts, seed),
    "weighted": lambda dataset, parts, seed, *, capacities: weighted(len(dataset), parts, capacities),
}
"""Each way by name: a function of data set, number of parts, seed and options that returns the owners."""


def partition(kind: str, dataset: Dataset, parts: int, *, seed: int, options: Mapping[str, Any] | None = None) -> Array:
    """Return the owner of each row.

    Parameters
    ----------
    kind : str
        A key of `PARTITIONS`.
    dataset : Dataset
        What is to be owned.
    parts : int
        Number of ranks.
    seed : int
        For ``random``.
    options : mapping, optional
        ``by_feature``: ``feature``, a number or name (the labels without it).  ``weighted``: ``capacities``, a number
        for each part.

    Returns
    -------
    array of int32, shape (n,)
        Number of a part, from 0; the same on all ranks.
    """
    check_dataset("partition", dataset)
    check_whole("partition", "parts", parts, 1)
    way = choose(PARTITIONS, "partition", kind)
    return call(way, f"partition {kind!r}", dataset, parts, seed, options=options or {})


def missing_classes(dataset: Dataset, owner: Array, parts: int) -> list[list[int]]:
    """Return, for each part, the classes of the data set of which it owns no row.

    A missing class changes nothing in training that reduces gradients at every step; it matters where ranks train for
    a while on their own rows.
    """
    check_dataset("missing_classes", dataset)
    check_whole("missing_classes", "parts", parts, 1)
    present = np.zeros((parts, dataset.classes), bool)
    present[owner, dataset.column()] = True
    return [np.flatnonzero(~row).tolist() for row in present]
