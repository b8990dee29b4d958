"""Embedding: a table of vectors, looked up by number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpitrain._errors import DataError
from mpitrain._typing import Array, Tree
from mpitrain.arrays import Group, is_cupy
from mpitrain.arrays.dtypes import accumulator
from mpitrain.nn import checks
from mpitrain.nn.initial import normal
from mpitrain.nn.layer import Call, Context, Layer, Parameter


class Embedding(Layer):
    """Replace each number by its vector: integers (n, …) to (n, …, features).

    Parameters
    ----------
    count : int
        Number of vectors; inputs lie in [0, count).
    features : int
        Length of a vector.  ``weight`` has shape (count, features).
    std : float
        Standard deviation of the initial vectors, drawn from N(0, std²).
    decay : bool
        Whether weight decay shrinks the vectors.
    """

    takes_indices = True

    def __init__(self, count: int, features: int, std: float = 1.0, decay: bool = True) -> None:
        self.count = checks.positive("Embedding: count", count)
        self.features = checks.positive("Embedding: features", features)
        self.std = checks.spread("Embedding: std", std)
        self.decay = decay

    def parameters(self) -> Sequence[Parameter]:
        """Return the table."""
        group: Group = "decay" if self.decay else "no_decay"
        return (Parameter("weight", (self.count, self.features), normal(self.std), group),)

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Look the vectors up.

        Raises
        ------
        DataError
            The input is not integers, or a number is not in the table.
        """
        self._check(x)
        context = call.context()
        y = context.take((*x.shape, self.features), params["weight"].dtype)
        gather_rows(params["weight"], x, y)
        context["x"] = x
        return y, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return zeros: numbers have no gradient."""
        dx = context.take(context["x"].shape, dy.dtype)
        dx[...] = 0
        return dx

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the sum of ``dy`` over the occurrences of each number."""
        numbers = context["x"].ravel()
        add_rows(grads["weight"], numbers, dy.reshape(numbers.size, self.features), call)

    def _check(self, x: Array) -> None:
        if x.dtype.kind not in "iu":
            raise DataError("Embedding: the input is not integers", got=x.dtype, expected="an integer dtype")
        if x.size and (x.min() < 0 or x.max() >= self.count):
            position = tuple(int(axis[0]) for axis in ((x < 0) | (x >= self.count)).nonzero())
            raise DataError(
                f"Embedding: the number at position {position} has no vector",
                got=int(x[position]),
                expected=f"0 to {self.count - 1}",
            )


def add_rows(table: Array, numbers: Array, values: Array, call: Call) -> None:
    """Add row i of ``values`` to row ``numbers[i]`` of ``table``, for every i.

    Occurrences are sorted and summed run by run: five times as fast as ``add.at``, and in a fixed order.
    """
    xp = call.xp
    if numbers.size == 0:
        return
    order = xp.argsort(numbers, kind="stable")
    ordered = numbers[order]
    starts_run = xp.ones(ordered.shape, bool)
    xp.not_equal(ordered[1:], ordered[:-1], out=starts_run[1:])
    starts = xp.flatnonzero(starts_run)
    rows = call.take(values.shape, values.dtype)
    gather_rows(values, order, rows)
    wide = np.float64 if is_cupy(rows) else accumulator(rows.dtype)  # CuPy takes differences of running sums
    table[ordered[starts]] += xp.add.reduceat(rows, starts, axis=0, dtype=wide)
    call.give(rows)


def gather_rows(table: Array, numbers: Array, out: Array) -> None:
    """Write ``table[numbers]`` into ``out``; the numbers are known to be in the table."""
    if is_cupy(table):
        table.take(numbers, axis=0, out=out)
    else:  # any other mode than "clip", which has nothing to clip here, copies the output once more
        table.take(numbers, axis=0, out=out, mode="clip")
