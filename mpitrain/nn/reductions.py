"""Sums over samples and over features, the way that is fast and accurate for channels-last arrays."""

from __future__ import annotations

from math import prod

from mpitrain._typing import Array, Tree
from mpitrain.arrays import unwritten
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
    positions, features = prod(x.shape[1:-1]), x.shape[-1]
    sums = sample_sums(x, call)
    if positions != 1:  # none at all, where a sequence is divided among more ranks than it has places
        sums = call.xp.matmul(_ones(positions, x, call), sums.reshape(positions, features))
    return sums.reshape(features)


def sample_sums(x: Array, call: Call) -> Array:
    """Return the sums over the first axis, shape ``x.shape[1:]``, as `column_sums` does; a new array."""
    sums: Array = call.xp.matmul(_ones(x.shape[0], x, call), x.reshape(x.shape[0], prod(x.shape[1:])))
    return sums.reshape(x.shape[1:])


def row_sums(x: Array, out: Array, call: Call, scale: float = 1.0) -> None:
    """Write the sums over the last axis, times ``scale``, to ``out``, shape ``(*x.shape[:-1], 1)``.

    As a product with a column of constants: four times as fast as ``x.sum(axis=-1)`` for rows of a few hundred.
    """
    call.xp.matmul(x, call.xp.full((x.shape[-1], 1), scale, x.dtype), out=out)


def rows(x: Array) -> Array:
    """Return ``x`` as a matrix of its last axis; BLAS gets one product instead of one per sample."""
    return x.reshape(x.size // x.shape[-1], x.shape[-1])


def add_product(left: Array, right: Array, grads: Tree, name: str, call: Call) -> None:
    """Add ``leftᵀ right`` to the gradient ``name``, or write it there if nothing was added yet."""
    fresh = unwritten(grads, name)
    if fresh is not None:
        call.xp.matmul(left.T, right, out=fresh)
        return
    product = call.take((left.shape[1], right.shape[1]), right.dtype)
    call.xp.matmul(left.T, right, out=product)
    grads[name][...] += product
    call.give(product)


def _ones(size: int, like: Array, call: Call) -> Array:
    ones: Array = call.xp.ones(size, like.dtype)
    return ones
