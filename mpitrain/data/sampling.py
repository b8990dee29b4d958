"""In which order an epoch takes the rows of a data set; the same on every rank and for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays import Key
from mpitrain.data.shares import bounded

Sampling: TypeAlias = Callable[[int, Key, Array | None], Array]
"""Number of rows, key of the epoch and the rows' probabilities give the epoch's row numbers: int64, shape (n,)."""


def shuffle(rows: int, key: Key, probabilities: Array | None = None) -> Array:
    """Take every row once, in random order."""
    return key.permutation(rows)


def sequential(rows: int, key: Key, probabilities: Array | None = None) -> Array:
    """Take every row once, in the order of the data set, in every epoch."""
    return np.arange(rows)


def importance(rows: int, key: Key, probabilities: Array | None = None) -> Array:
    """Draw rows with replacement, each with its probability.

    A row's loss is to be multiplied by ``importance_factors``, so that the gradient's expectation stays that of the
    mean over all rows.

    Notes
    -----
    By the inverse of the cumulative distribution.  Sources: Needell, Srebro, Ward, "Stochastic gradient descent,
    weighted sampling, and the randomized Kaczmarz algorithm", NeurIPS 2014, eq. 3.1; Zhao and Zhang, "Stochastic
    optimization with importance sampling for regularized loss minimization", ICML 2015, eq. 5.
    """
    assert probabilities is not None, "the loader gives them"
    cumulative = np.cumsum(probabilities)
    uniform = key.uniform(np.arange(rows), (0, 1), np.float64)[:, 0]
    drawn: Array = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return drawn


SAMPLINGS: dict[str, Sampling] = {"importance": importance, "sequential": sequential, "shuffle": shuffle}
"""Each way of sampling by name."""


def importance_probabilities(weights: Array | None, rows: int) -> Array:
    """Return the probability of each row: its weight by the sum of all, float64.

    Raises
    ------
    InputError
        There is not one weight for each row, or one is not positive: a row that is never drawn would bias the result.
    """
    if weights is None:
        raise InputError("importance sampling: no weights", expected="sampling_weights, one for each row")
    given = np.asarray(weights, np.float64)
    if given.shape != (rows,):
        raise InputError("importance sampling: not one weight for each row", got=given.shape, expected=(rows,))
    wrong = ~(np.isfinite(given) & (given > 0))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"importance sampling: the weight of row {row} is unusable", got=given[row],
            expected="a positive number, as a row that is never drawn would bias the result",
        )  # fmt: skip
    scaled = bounded(given)
    probabilities: Array = scaled / scaled.sum()
    return probabilities


def importance_factors(probabilities: Array) -> Array:
    """Return the factor ``1 / (N p_i)`` on each row's loss, float64."""
    factors: Array = 1.0 / (len(probabilities) * probabilities)
    return factors
