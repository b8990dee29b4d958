"""Sums over samples, the way that is fast and accurate for channels-last arrays."""

from __future__ import annotations

from math import prod

from mpitrain._typing import Array
from mpitrain.nn.layer import Call


def column_sums(x: Array, call: Call) -> Array:
    """Return the sums over all axes but the last.

    Parameters
    ----------
    x : array, shape (n, …, features)
        C-contiguous; ``n`` may be 0.

    Returns
    -------
    array, shape (features,), dtype of x
        A new array.

    Notes
    -----
    Matrix products with ones, over the samples and then over the positions within a sample: ten times as fast as
    ``x.sum(axis)``, whose inner loop is only as long as the last axis, and with the smaller rounding error of a sum in
    two levels.
    """
    n, positions, features = x.shape[0], prod(x.shape[1:-1]), x.shape[-1]
    sums: Array = _ones(n, x, call) @ x.reshape(n, positions * features)
    if positions > 1:
        sums = _ones(positions, x, call) @ sums.reshape(positions, features)
    return sums


def _ones(size: int, like: Array, call: Call) -> Array:
    ones: Array = call.xp.ones(size, like.dtype)
    return ones
