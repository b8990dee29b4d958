"""Data sets in delimited text: one row a sample, one column a feature or a target."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from csv import reader
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpitrain._errors import DataError
from mpitrain._options import brief
from mpitrain._typing import Array
from mpitrain.data.dataset import Dataset
from mpitrain.data.sources.files import PathLike, reading

Column = str | int
"""A column by its name in the header or by its number; negative numbers count from the last."""

_INTEGER = re.compile(r"[+-]?\d+")


def csv(
    *,
    path: PathLike,
    target: Column | Sequence[Column] = -1,
    task: Literal["classification", "regression"] = "classification",
    header: bool = True,
    delimiter: str = ",",
    classes: Sequence[str] = (),
) -> Dataset:
    """Return a data set of a delimited text file (UTF-8); every rank reads it.

    Parameters
    ----------
    path : path
        The file.
    target : str, int, or a list of them
        The column to learn; a regression may have several.  All others are features and must hold numbers.
    task : {"classification", "regression"}
        For a classification the distinct labels, sorted (by value if all are integers, else as text), are the
        classes 0, 1, …; so two files number them alike only if they have the same ones, or are given ``classes``.
    header : bool
        The first row holds the columns' names.
    delimiter : str
        What separates cells.
    classes : sequence of str, optional
        The labels of a classification, in the order of their numbers: those of a training set, for the file that it
        is tested on (`Dataset.class_names`).  By default those of this file.
    """
    table = read_table(path, header=header, delimiter=delimiter)
    wanted = [target] if isinstance(target, str | int) else target
    targets = [table.find(column) for column in wanted]
    features = [number for number in range(len(table.names)) if number not in targets]
    if task == "classification" and len(targets) != 1:
        raise DataError(f"{path}: a classification has one target column", got=target)
    if not features:
        raise DataError(
            f"{path}: no column is left for features", got=", ".join(map(repr, table.names)),
            expected="a target and at least one more", remedy=f"the delimiter may be another than {delimiter!r}",
        )  # fmt: skip
    inputs, feature_names = table.numbers(features), table.named(features)
    if task == "regression":
        if classes:
            raise DataError(f"{path}: a regression has no classes", got=brief(classes))
        values = table.numbers(targets)
        return Dataset(inputs, values, task, table.name, (), feature_names, table.named(targets))
    names, labels = table.labels(targets[0], classes)
    return Dataset(inputs, labels, task, table.name, names, feature_names)


@dataclass(frozen=True)
class Table:
    """The cells of a delimited file, as text.

    Parameters
    ----------
    name : str
        The file.
    names : tuple of str
        Names of the columns; their numbers where there is no header.
    rows : list of list of str
        The cells; as many in each row as there are names.
    lines : list of int
        Number in the file, from 1, of the line on which each row ends.
    """

    name: str
    names: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]

    def find(self, column: Column) -> int:
        """Return the number of a column."""
        if isinstance(column, int) and -len(self.names) <= column < len(self.names):
            return column % len(self.names)
        if column in self.names:
            return self.names.index(str(column))
        expected = f"a number below {len(self.names)} or one of {', '.join(self.names)}"
        raise DataError(f"{self.name}: no such column", got=repr(column), expected=expected)

    def named(self, columns: Sequence[int]) -> tuple[str, ...]:
        """Return the names of some columns."""
        return tuple(self.names[number] for number in columns)

    def numbers(self, columns: Sequence[int]) -> Array:
        """Return some columns as float64, shape (n, len(columns))."""
        values = array("d")
        for line, row in zip(self.lines, self.rows, strict=True):
            for number in columns:
                try:
                    values.append(_number(row[number]))
                except ValueError as error:
                    raise DataError(
                        f"{self.name}: line {line}, column {self.names[number]!r} is not a number",
                        got=repr(row[number]), expected="a number", remedy="remove the row or fill the value in",
                    ) from error  # fmt: skip
        return np.frombuffer(values, np.float64).reshape(len(self.rows), len(columns)).copy()

    def labels(self, column: int, known: Sequence[str] = ()) -> tuple[tuple[str, ...], Array]:
        """Return the labels of a column, ``known`` or sorted distinct ones, and the int64 number of each row's."""
        cells = [row[column].strip() for row in self.rows]
        distinct = set(cells)
        if "" in distinct:
            line = self.lines[cells.index("")]
            raise DataError(f"{self.name}: line {line}, column {self.names[column]!r}: the label is missing")
        classes = tuple(known) or _sorted(distinct)
        strange = sorted(distinct.difference(classes))
        if strange:
            place = f"line {self.lines[cells.index(strange[0])]}, column {self.names[column]!r}"
            raise DataError(f"{self.name}: {place}: no such class", got=repr(strange[0]), expected=" or ".join(classes))
        numbers = {label: number for number, label in enumerate(classes)}
        if len(numbers) < len(classes):
            raise DataError(f"{self.name}: a class is named twice", got=brief(known))
        return classes, np.array([numbers[cell] for cell in cells], np.int64)


def read_table(path: PathLike, *, header: bool = True, delimiter: str = ",") -> Table:
    """Read a delimited text file; blank lines are skipped.

    Raises
    ------
    DataError
        The file is missing, unreadable, not UTF-8 or without rows; its rows differ in length; the header repeats a
        name or holds only numbers, which is more likely a first row of data.
    """
    rows, lines = [], []
    with reading(path, "delimited text in UTF-8") as file, file.open(encoding="utf-8-sig", newline="") as stream:
        found = reader(stream, delimiter=delimiter, strict=True)
        for row in filter(None, found):
            rows.append(row)
            lines.append(found.line_num)
    if len(rows) <= header:
        raise DataError(f"{path}: no rows", got=f"{len(rows)} lines", expected="at least one row of data")
    width = len(rows[0])
    for row, line in zip(rows, lines, strict=True):
        if len(row) != width:
            raise DataError(f"{path}: line {line} has another length", got=f"{len(row)} cells", expected=width)
    numbers = tuple(map(str, range(width)))
    names = tuple(cell.strip() for cell in rows[0]) if header else numbers
    if names != numbers:
        _check_header(names, str(path))
    return Table(str(path), names, rows[header:], lines[header:])


def _sorted(labels: set[str]) -> tuple[str, ...]:
    by_value = all(map(_INTEGER.fullmatch, labels))
    # the text breaks ties ("1", "01"): the order of a set of strings differs from process to process
    return tuple(sorted(labels, key=lambda label: (int(label) if by_value else 0, label)))


def _check_header(names: tuple[str, ...], path: str) -> None:
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"{path}: two columns have one name", got=", ".join(map(repr, twice)))
    if all(map(_is_number, names)):  # read as names, this row would silently be lost
        remedy = "set header = false if the first row is data"
        raise DataError(f"{path}: the header has numbers for names", got=", ".join(names[:5]), remedy=remedy)


def _number(cell: str) -> float:
    if "_" in cell:  # Python reads 1_000 as 1000
        raise ValueError(cell)
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
