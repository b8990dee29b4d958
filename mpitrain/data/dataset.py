"""What a data set is: inputs, targets and names, possibly memory-mapped; knows nothing of ranks or batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, get_args

import numpy as np

from mpitrain._errors import DataError, InputError
from mpitrain._options import Interval, brief, check_kind
from mpitrain._typing import Array, Shape
from mpitrain.data.checks import check_values
from mpitrain.data.rows import Rows, Selection, check_rows, gather, overlap_of, part, select

Task = Literal["classification", "regression", "sequence"]
"""``sequence``: the targets are the tokens that follow the inputs."""

BLOCK_BYTES = 8 << 20
"""How much of a data set is looked at in one go."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and what is to be learnt of them; the same on every rank.

    Parameters
    ----------
    inputs : array or Selection, shape (n, …)
        Samples; images are channels-last.  May be memory-mapped: nothing here loads it whole.
    targets : array or Selection
        ``classification``: integer labels, shape (n,).  ``regression``: numbers, shape (n, outputs).
        ``sequence``: integer tokens, shape (n,) or (n, context), as the inputs.
    task : {"classification", "regression", "sequence"}
        What the targets mean.
    name : str
        What messages call it: a registered name, or the file.
    class_names, feature_names, target_names : tuple of str
        Names of the classes (or of the vocabulary's tokens), of the columns of the inputs, and of the columns of the
        targets; empty where there are none.
    tokens : bool
        The inputs are numbers of tokens, for an embedding: they stay integers.  True of every sequence.
    overlap : int
        With how many of the rows that follow it a row may share values: 0, unless rows are overlapping windows of a
        text.
    gaps : bool
        Rows that overlap may be missing in between, as after `take`.

    Raises
    ------
    DataError
        The shapes do not fit together, or there is not one name for each class or column.
    """

    inputs: Rows
    targets: Rows
    task: Task
    name: str
    class_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()
    target_names: tuple[str, ...] = ()
    tokens: bool = False
    overlap: int = 0
    gaps: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.task, str) or self.task not in get_args(Task):
            raise InputError(f"{self.name}: unknown task", got=repr(self.task), expected=" or ".join(get_args(Task)))
        object.__setattr__(self, "tokens", self.tokens or self.task == "sequence")
        self._keep_names()
        self._check_shapes()

    def _keep_names(self) -> None:
        """Turn the names, of whatever sequence, into tuples."""
        for what in ("class_names", "feature_names", "target_names"):
            names = getattr(self, what)
            if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(n, str) for n in names):
                raise DataError(f"{self.name}: {what} are no names", got=brief(names), expected="a sequence of strings")
            object.__setattr__(self, what, tuple(names))

    def _check_shapes(self) -> None:
        for what in ("inputs", "targets"):
            if not isinstance(values := getattr(self, what), np.ndarray | Selection):
                kind = type(values).__name__
                raise DataError(f"{self.name}: {what} are no NumPy array", got=kind, remedy="numpy.asarray gives one")
        inputs, targets = self.inputs.shape, self.targets.shape
        if not inputs or not targets or inputs[0] != targets[0]:
            raise DataError(
                f"{self.name}: inputs and targets differ in length", got=f"shapes {inputs} and {targets}",
                expected="as many targets as inputs",
            )  # fmt: skip
        expected = {"classification": "(n,)", "regression": "(n, outputs)", "sequence": str(inputs)}[self.task]
        fits = {"classification": len(targets) == 1, "regression": len(targets) == 2, "sequence": targets == inputs}
        if not fits[self.task]:
            raise DataError(f"{self.name}: targets have the wrong shape", got=targets, expected=expected)
        for what, names, axis in (("feature", self.feature_names, inputs), ("target", self.target_names, targets)):
            if names and (len(axis) != 2 or len(names) != axis[1]):
                raise DataError(f"{self.name}: {what} names do not fit", got=f"{len(names)} names", expected=axis)

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    @property
    def sample_shape(self) -> Shape:
        """Shape of one sample."""
        return self.inputs.shape[1:]

    @cached_property
    def classes(self) -> int:
        """Number of classes (of the vocabulary's tokens): of the names or, without names, the largest label plus one.

        Raises
        ------
        InputError
            The task is regression.
        """
        if self.task == "regression":
            raise InputError(f"{self.name}: a regression has no classes")
        largest = (int(targets.max(initial=0)) for _, _, targets in self.cover().blocks())
        return len(self.class_names) or max(largest, default=-1) + 1

    @property
    def outputs(self) -> int:
        """How many numbers a model of this data set gives for a sample (or token)."""
        return int(self.targets.shape[1]) if self.task == "regression" else self.classes

    def rows(self, indices: Array) -> tuple[Array, Array]:
        """Return the inputs and targets of some rows, in the order asked for, as new arrays.

        Parameters
        ----------
        indices : array of int, shape (k,)
            Row numbers, each from 0 to ``len(self) - 1``; may repeat.

        Raises
        ------
        InputError
            They are no integers (a mask, say), or there is no such row.
        """
        indices = check_rows(self.name, indices, len(self))
        return gather(self.inputs, indices), gather(self.targets, indices)

    def take(self, indices: Array, name: str | None = None) -> Dataset:
        """Return the data set of some rows; memory-mapped rows stay on disk.

        Parameters
        ----------
        indices : array of int, shape (k,)
            Row numbers, each from 0 to ``len(self) - 1``; may repeat.
        name : str, optional
            What messages call it; by default as this one.

        Raises
        ------
        InputError
            As for `rows`.
        """
        indices = check_rows(self.name, indices, len(self))
        inputs, targets = select(self.inputs, indices), select(self.targets, indices)
        overlap = overlap_of(indices, self.overlap)
        name = name or self.name
        return replace(self, inputs=inputs, targets=targets, name=name, overlap=overlap, gaps=overlap > 0)

    def part(self, rows: slice) -> Dataset:
        """Return the data set of some rows that are evenly spaced, as views."""
        spaced = -(-(self.overlap + 1) // abs(rows.step or 1)) - 1
        return replace(self, inputs=part(self.inputs, rows), targets=part(self.targets, rows), overlap=spaced)

    def cover(self) -> Dataset:
        """Return rows that hold every value of the data set: all of them, or of overlapping rows a few.

        Notes
        -----
        Where rows in between may be missing, all are needed.
        """
        if not self.overlap or self.gaps:
            return self
        few = self.take(np.append(np.arange(0, len(self) - 1, self.overlap), len(self) - 1))
        return replace(few, overlap=0)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Array, Array]]:
        """Walk over rows ``[start, stop)`` in blocks of about 8 MiB: first row, inputs and targets of each."""
        stop = len(self) if stop is None else stop
        row_bytes = sum(prod(a.shape[1:]) * a.dtype.itemsize for a in (self.inputs, self.targets))
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield first, self.inputs[first:last], self.targets[first:last]

    def column(self, feature: int | str | None = None) -> Array:
        """Return one feature of every row or, without ``feature``, the labels: shape (n,).

        Raises
        ------
        InputError
            There is no such feature, or the inputs (the targets) are not a table.
        """
        if feature is None:
            if self.targets.ndim != 1:
                raise InputError(f"{self.name}: the targets are not labels", got=self.targets.shape, expected="(n,)")
            return np.asarray(self.targets)
        number: Any = self.feature_names.index(feature) if feature in self.feature_names else feature
        columns = self.inputs.shape[1] if self.inputs.ndim == 2 else 0
        if not Interval(0, columns, whole=True).admits(number):
            names = ", ".join(self.feature_names) or "none are named"
            expected = f"a number below {columns} or a name ({names})"
            raise InputError(f"{self.name}: no such feature", got=repr(feature), expected=expected)
        blocks = [np.array(inputs[:, number]) for _, inputs, _ in self.blocks()]
        return np.concatenate(blocks) if blocks else np.empty(0, self.inputs.dtype)

    def check(self, start: int = 0, stop: int | None = None) -> None:
        """Check every value of rows ``[start, stop)``, a block at a time; ranks may check a share each.

        Raises
        ------
        DataError
            The set is empty; an input or a number to be predicted is not finite; a label is not an integer, is
            negative, or is larger than the number of classes.  File, row (counted from 0) and column are named.
        """
        check_values(self, start, stop)


def check_dataset(operation: str, dataset: object) -> None:
    """Raise an InputError unless something is a data set."""
    check_kind(operation, "dataset", dataset, Dataset, 'a Dataset, e.g. mpitrain.data.load("digits")')
