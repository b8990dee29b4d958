"""Memory for results: a large one takes that of the last of its size which nobody refers to any more.

A kernel hands out zeroed pages, one fault each, and takes them back as soon as an array is dropped; a loop that sums 64
MiB at each turn would pay that at each turn, on all ranks of a node at once.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.flatbuffer import plain

SMALLEST_BYTES = 4 << 20
"""Of memory that is kept; below, the C library keeps what was freed itself."""

LARGEST_BYTES = 256 << 20
"""Of memory that is kept: as much as a process may hold for a result that never comes."""

_kept: list[Array] = []  # one block, or none


class _Loan:
    """A block of memory, in the hands of the arrays that have this as their base."""

    def __init__(self, memory: Array) -> None:
        self._memory: Final = memory
        self.__array_interface__: Final[dict[str, Any]] = memory.__array_interface__

    def __del__(self, kept: list[Array] = _kept) -> None:  # bound here: a module's names may be gone at the end
        kept[:] = [self._memory]


def empty(shape: Shape, dtype: DType) -> Array:
    """Return memory for a result, of any values.

    Parameters
    ----------
    shape : tuple of int
    dtype : numpy.dtype

    Returns
    -------
    array of dtype, shape ``shape``
        Nobody else's.
    """
    size = math.prod(shape)
    nbytes = size * dtype.itemsize
    if not SMALLEST_BYTES <= nbytes <= LARGEST_BYTES:
        return np.empty(shape, dtype)
    return np.asarray(_Loan(_memory(nbytes))).view(dtype).reshape(shape)


def _memory(nbytes: int) -> Array:
    try:
        memory = _kept.pop()
    except IndexError:  # none, or another thread has just taken it
        return plain(nbytes, np.dtype(np.uint8))
    return memory if memory.size == nbytes else plain(nbytes, memory.dtype)
