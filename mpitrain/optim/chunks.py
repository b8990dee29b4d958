"""How an update walks memory: in chunks small enough to stay in cache while the steps of a rule pass over them.

A rule like Adam's is a dozen elementwise operations.  Over whole arrays each would stream from main memory; over a
chunk all but the first touch cache, so that memory is passed over once.  On a GPU, where launching a kernel costs more
than cache saves, one chunk is everything.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpitrain._typing import Array
from mpitrain.arrays import Shard, is_cupy, namespace

CHUNK_BYTES = 128 * 1024
"""Parameters, gradients, two slots and scratch of one chunk fit a 1 MiB cache."""


def _length(array: Array) -> int:
    return int(array.size) if is_cupy(array) else CHUNK_BYTES // array.dtype.itemsize


def chunks(where: slice, array: Array) -> Iterator[slice]:
    """Cut the stretch ``where`` of ``array`` into slices that stay in cache."""
    length = max(1, _length(array))
    return (slice(start, min(start + length, where.stop)) for start in range(where.start, where.stop, length))


def trained_chunks(shard: Shard, array: Array) -> Iterator[tuple[int, slice]]:
    """Yield the number of each trained tensor of a shard, with each chunk of it in ``array``, of the shard's size."""
    for number, piece in shard.pieces:
        if shard.layout.segments[number].group != "statistics":
            for chunk in chunks(piece, array):
                yield number, chunk


def scratch(like: Array, dtype: object = None) -> Array:
    """Return uninitialised memory of the largest chunk's length, of ``like``'s dtype unless another is given.

    It is made for each call, not kept, so that threads may share an optimizer; that costs a microsecond.
    """
    found: Array = namespace(like).empty(min(like.size, _length(like)), dtype or like.dtype)
    return found


def sum_of_squares(chunk: Array, wide: Array) -> Array:
    """Return the sum of squares of a chunk as a float64 scalar where the chunk lives.

    Squares are taken and added in float64 and pairwise: float32 values cannot overflow, and no BLAS thread count
    changes the result.

    Parameters
    ----------
    chunk : array, shape (n,)
        Values.
    wide : array of float64, shape (≥ n,)
        Scratch.
    """
    squares = wide[: chunk.size]
    squares[...] = chunk
    squares *= squares
    total: Array = squares.sum()
    return total
