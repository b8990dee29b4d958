"""Shifts and scales a table to mean 0 and standard deviation 1, by the numbers of the training rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.data.dataset import Dataset, check_dataset
from mpitrain.data.rows import Rows


@dataclass(frozen=True, eq=False)
class Scaling:
    """An affine map per column: ``(values - mean) / scale``.

    Parameters
    ----------
    mean, scale : array of float64, shape (columns…)
        Mean, and standard deviation (1 where it is 0, so that a constant column becomes 0).
    """

    mean: Array
    scale: Array

    def apply(self, values: Rows) -> Array:
        """Return the scaled values, float64; a memory map is read whole.

        Raises
        ------
        InputError
            The samples have another shape than those that were measured.
        """
        if values.shape[1:] != self.mean.shape:
            raise InputError(
                "the samples have another shape than those that were measured", operation="standardise",
                got=values.shape[1:], expected=self.mean.shape,
            )  # fmt: skip
        scaled: Array = (np.asarray(values) - self.mean) / self.scale
        return scaled

    def undo(self, values: Array) -> Array:
        """Return scaled values, a model's outputs say, in their own units."""
        restored: Array = np.asarray(values) * self.scale + self.mean
        return restored


@dataclass(frozen=True, eq=False)
class Standardise:
    """The scaling of a data set's inputs and, of a regression if wanted, of its targets.

    Parameters
    ----------
    inputs : Scaling
        That of the inputs.
    targets : Scaling, optional
        That of the targets; None leaves them in their own units.

    Examples
    --------
    >>> train, test = split(diabetes(), seed=0)
    >>> standardise = Standardise.fit(train, targets=True)
    >>> train, test = standardise(train), standardise(test)
    """

    inputs: Scaling
    targets: Scaling | None = None

    @classmethod
    def fit(cls, train: Dataset, *, targets: bool = False) -> Standardise:
        """Measure the rows to train on.

        Parameters
        ----------
        train : Dataset
            Not the rows held out: what is known of them must not leak into training.
        targets : bool
            Scale the targets of a regression too.

        Raises
        ------
        InputError
            The set is empty, its inputs are tokens, or its targets are labels.

        Notes
        -----
        Not collective: every rank computes it from the same rows, in float64 and in the same order, so that all get
        the same bits.  Two passes, a block at a time.
        """
        check_dataset("Standardise.fit", train)
        if train.tokens:
            raise InputError(f"{train.name}: tokens cannot be standardised", expected="numbers")
        if targets and train.task != "regression":
            raise InputError(f"{train.name}: labels cannot be standardised", got=train.task, expected="a regression")
        if not len(train):
            raise InputError(f"{train.name}: no rows to standardise by", expected="at least one")
        inputs = _measure(lambda: (inputs for _, inputs, _ in train.blocks()), len(train))
        if not targets:
            return cls(inputs)
        return cls(inputs, _measure(lambda: (targets for _, _, targets in train.blocks()), len(train)))

    def __call__(self, dataset: Dataset) -> Dataset:
        """Return the data set, scaled; held in memory as float64.

        Raises
        ------
        InputError
            Its samples have another shape than those that were measured.
        """
        targets = self.targets.apply(dataset.targets) if self.targets else dataset.targets
        return replace(dataset, inputs=self.inputs.apply(dataset.inputs), targets=targets)


def _measure(blocks: Callable[[], Iterator[Array]], rows: int) -> Scaling:
    """Measure what ``blocks()`` walks over, of ``rows`` rows in all."""

    def mean_of(function: Callable[[Array], Array]) -> Array:
        return np.asarray(sum(function(block).sum(axis=0, dtype=np.float64) for block in blocks())) / rows

    # differences from the first row: those of a constant column are 0, its sum is rounded
    first = np.asarray(next(blocks())[0], np.float64)
    mean = first + mean_of(lambda values: values - first)
    scale = np.sqrt(mean_of(lambda values: (values - mean) ** 2))
    return Scaling(mean, np.where(scale > 0, scale, 1.0))
