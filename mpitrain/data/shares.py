"""How rows are dealt out: near-equal blocks, and shares in proportion to weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpitrain._typing import Array


def share(rows: int, parts: int, part: int) -> tuple[int, int]:
    """Return the ``(start, stop)`` of one of ``parts`` near-equal blocks; 7 rows in 3 parts are 3, 2 and 2."""
    quotient, rest = divmod(rows, parts)
    start = part * quotient + min(part, rest)
    return start, start + quotient + (part < rest)


def share_sizes(rows: int, parts: int) -> Array:
    """Return the sizes of the near-equal blocks: int64, shape (parts,)."""
    return rows // parts + (np.arange(parts) < rows % parts)


def bounded(weights: Array) -> Array:
    """Return weights times a power of two, in the same proportions to the bit, so that their sum is finite."""
    _, exponent = np.frexp(weights.max(initial=0.0))
    scaled: Array = np.ldexp(weights, -exponent)
    return scaled


def apportion(total: int, weights: Sequence[float] | Array) -> Array:
    """Deal ``total`` rows out in proportion to ``weights``, by the largest remainder.

    Parameters
    ----------
    total : int
        How many rows there are.
    weights : sequence of float, shape (parts,)
        Not negative, and not all zero.

    Returns
    -------
    array of int64, shape (parts,)
        Sums to ``total``; each part is within one of its exact share.  Equal remainders: the first part wins.
    """
    given = bounded(np.asarray(weights, np.float64))
    exact = given * (total / given.sum())
    counts: Array = np.floor(exact).astype(np.int64)
    seats = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:seats]] += 1
    return counts
