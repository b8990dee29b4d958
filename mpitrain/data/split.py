"""Which rows are trained on and which are held out; the same on every rank and for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mpitrain._errors import DataError, InputError
from mpitrain._options import Interval
from mpitrain._typing import Array
from mpitrain.arrays import Key
from mpitrain.data.dataset import Dataset, check_dataset
from mpitrain.data.shares import apportion


def split(dataset: Dataset, test: float = 0.2, *, seed: int, stratified: bool | None = None) -> tuple[Dataset, Dataset]:
    """Split a data set at random into one to train on and one to test on.

    Parameters
    ----------
    dataset : Dataset
        What to split; memory-mapped rows stay on disk.
    test : float
        Fraction of the rows to test on, rounded to a whole number of rows.
    seed : int
        The split depends on it and on nothing else.
    stratified : bool, optional
        Each class is split in this proportion (to within one row).  None: if the task is classification.

    Returns
    -------
    train, test : Dataset
        Rows in their order in ``dataset``.

    Raises
    ------
    InputError
        One side would be empty, or the task has no classes to stratify by.
    DataError
        A class has a single row.
    """
    _check_apart(dataset)
    rows = len(dataset)
    held_out = _held_out(rows, test)
    order = Key(seed, "split").permutation(rows)
    wanted = _strata(dataset, order, held_out) if _stratify(dataset, stratified) else order[:held_out]
    is_test = np.zeros(rows, bool)
    is_test[wanted] = True
    return dataset.take(np.flatnonzero(~is_test)), dataset.take(np.flatnonzero(is_test))


def split_end(dataset: Dataset, test: float = 0.2) -> tuple[Dataset, Dataset]:
    """Split off the last rows to test on: of a text or a time series, what comes after all that is trained on.

    Parameters
    ----------
    dataset : Dataset
        What to split; memory-mapped rows stay on disk.
    test : float
        Fraction of the rows to test on, rounded to a whole number of rows.

    Returns
    -------
    train, test : Dataset
        Rows in their order in ``dataset``.  Where rows overlap (windows of a text), those that share tokens with both
        sides are left out, and the test rows are thinned until none overlap, so that each token is predicted once.

    Raises
    ------
    InputError
        One side would be empty.
    """
    check_dataset("split_end", dataset)
    first = len(dataset) - _held_out(len(dataset), test, dataset.overlap)
    return dataset.part(slice(first - dataset.overlap)), dataset.part(slice(first, None, dataset.overlap + 1))


def folds(
    dataset: Dataset, k: int = 5, *, seed: int, stratified: bool | None = None
) -> Iterator[tuple[Dataset, Dataset]]:
    """Return an iterator over ``k`` pairs (train, test), the test sides of which are disjoint and cover all rows.

    Parameters
    ----------
    dataset, seed, stratified
        As for `split`.
    k : int
        Number of folds.  Their sizes, and each class's rows in them if stratified, differ by at most one.
    """
    _check_apart(dataset)
    rows = len(dataset)
    if not Interval(2, rows, "[]", whole=True).admits(k):
        raise InputError("folds: number of folds out of range", got=k, expected=f"2 to the number of rows, {rows}")
    order = Key(seed, "folds").permutation(rows)
    if _stratify(dataset, stratified):
        order = order[np.argsort(dataset.column()[order], kind="stable")]
    fold = np.empty(rows, np.int64)
    fold[order] = np.arange(rows) % k  # dealt out class by class, as cards are
    return ((dataset.take(np.flatnonzero(fold != i)), dataset.take(np.flatnonzero(fold == i))) for i in range(k))


def _held_out(rows: int, test: float, lost: int = 0) -> int:
    """Return how many rows are tested on; ``lost`` are left out on the other side, which keeps at least one."""
    found = round(test * rows) if Interval(0, 1, "()").admits(test) else 0
    if not 0 < found < rows - lost:
        raise InputError(
            "split: one side would be empty", got=f"test = {test!r} of {rows} rows",
            expected="a fraction between 0 and 1 that leaves a row on each side",
            remedy=f"{lost} rows are left out, as they may share values with both sides" if lost else None,
        )  # fmt: skip
    return found


def _check_apart(dataset: Dataset) -> None:
    check_dataset("split", dataset)
    if dataset.overlap:
        raise InputError(
            f"{dataset.name}: the rows overlap, so that random ones share values with the others",
            operation="split", remedy="hold out rows at the end, or let windows lie side by side",
        )  # fmt: skip


def _stratify(dataset: Dataset, stratified: bool | None) -> bool:
    if stratified and dataset.task != "classification":
        raise InputError(f"{dataset.name}: only a classification can be stratified", got=dataset.task)
    return dataset.task == "classification" if stratified is None else stratified


def _strata(dataset: Dataset, order: Array, held_out: int) -> Array:
    """Return the first rows of each class in ``order``: as many as fall to the class."""
    labels = dataset.column()[order]
    classes, counts = np.unique(labels, return_counts=True)
    if (counts == 1).any():
        raise DataError(
            f"{dataset.name}: class {classes[counts == 1][0]} has too few rows to be stratified",
            got="1 row", expected="at least 2",
            remedy='split with stratified = false or, if the labels are quantities, load them with task = "regression"',
        )  # fmt: skip
    quotas = apportion(held_out, counts)
    chosen = [order[labels == label][:quota] for label, quota in zip(classes, quotas, strict=True)]
    return np.concatenate(chosen)
