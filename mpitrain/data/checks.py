"""Whether the values of a data set can be trained on; reads it a block at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpitrain._errors import DataError
from mpitrain._typing import Array, DType
from mpitrain.arrays.dtypes import is_float

if TYPE_CHECKING:
    from mpitrain.data.dataset import Dataset


def check_values(dataset: Dataset, start: int = 0, stop: int | None = None) -> None:
    """Check rows ``[start, stop)``; see `Dataset.check`."""
    if not len(dataset):
        raise DataError(f"{dataset.name}: the data set is empty", got="0 rows", expected="at least one")
    check_types(dataset)
    limit = len(dataset.class_names) or None
    for first, inputs, targets in dataset.blocks(start, stop):
        if dataset.tokens:
            vocabulary = limit if dataset.task == "sequence" else None
            _check_range(dataset.name, "token", inputs, first, vocabulary)
        else:
            _check_finite(dataset.name, "column", dataset.feature_names, inputs, first)
        if dataset.task == "regression":
            _check_finite(dataset.name, "target", dataset.target_names, targets, first)
        else:
            _check_range(dataset.name, "label", targets, first, limit)


def check_types(dataset: Dataset) -> None:
    """Raise a DataError unless inputs are numbers, or tokens, and targets what the task has."""
    inputs, targets = dataset.inputs.dtype, dataset.targets.dtype
    if dataset.tokens and inputs.kind not in "iu":
        raise DataError(f"{dataset.name}: tokens are not integers", got=inputs, expected="integers from 0")
    if not _is_number(inputs):
        raise DataError(f"{dataset.name}: inputs are not numbers", got=inputs, expected="real numbers")
    if dataset.task == "regression" and not _is_number(targets):
        raise DataError(f"{dataset.name}: targets are not numbers", got=targets, expected="real numbers")
    if dataset.task != "regression" and targets.kind not in "iu":
        raise DataError(
            f"{dataset.name}: labels are not integers", got=targets, expected="integers from 0",
            remedy="convert them, or choose the task 'regression' if they are quantities",
        )  # fmt: skip


def _is_number(dtype: DType) -> bool:
    return is_float(dtype) or dtype.kind in "iub"


def _check_finite(name: str, what: str, columns: tuple[str, ...], block: Array, first: int) -> None:
    wrong = ~np.isfinite(block)
    if wrong.any():
        row, *column = (int(i) for i in np.argwhere(wrong)[0])
        place = repr(columns[column[0]]) if columns else ", ".join(map(str, column))
        raise DataError(
            f"{name}: row {first + row} (counted from 0), {what} {place} is not finite",
            got=block[(row, *column)], expected="a finite number", remedy="remove the row or fill the value in",
        )  # fmt: skip


def _check_range(name: str, what: str, block: Array, first: int, limit: int | None) -> None:
    wrong = block < 0 if limit is None else (block < 0) | (block >= limit)
    if wrong.any():
        row, *column = (int(i) for i in np.argwhere(wrong)[0])
        raise DataError(
            f"{name}: row {first + row} (counted from 0), {what} out of range",
            got=block[(row, *column)], expected="0 or more" if limit is None else f"0 to {limit - 1}",
        )  # fmt: skip
