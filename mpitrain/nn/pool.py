"""Free lists of arrays, so that a training step reuses the memory of the step before instead of allocating."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpitrain._typing import Array, DType, Shape

_Kind = tuple[str, Shape, DType]

_KEPT = 4
"""How many times as much as was ever lent at once may lie free: of batches whose size changes, few sizes are kept."""


class Pool:
    """Lends arrays and takes them back; a returned array is lent again for the same shape and dtype.

    Threads may share a pool: each operation on a free list is one atomic step of the interpreter.

    Attributes
    ----------
    misses : int
        How often nothing fitting was free and memory was allocated.
    nbytes : int
        How much was allocated and not dropped; of a model that always sees the same shapes, the activations that it
        needs at once.
    """

    def __init__(self) -> None:
        self._free: dict[_Kind, list[Array]] = {}
        self.misses = self.nbytes = self._most_lent = 0

    def take(self, shape: Shape, dtype: DType, xp: Any = np) -> Array:
        """Lend an array of ``xp`` with *arbitrary* contents; it belongs to the caller until `give`."""
        free = self._free.get((xp.__name__, shape, dtype))
        if free:
            try:
                return free.pop()
            except IndexError:  # another thread took the last one
                pass
        self.misses += 1
        if self._free_bytes() > _KEPT * self._most_lent:
            self.drop_free()
        array: Array = xp.empty(shape, dtype)
        self.nbytes += array.nbytes
        self._most_lent = max(self._most_lent, self.nbytes - self._free_bytes())
        return array

    def give(self, array: Array) -> None:
        """Take back an array that `take` lent; neither it nor a view of it may be used afterwards."""
        kind = (type(array).__module__.partition(".")[0], array.shape, array.dtype)
        self._free.setdefault(kind, []).append(array)

    def _free_bytes(self) -> int:
        return sum(array.nbytes for arrays in list(self._free.values()) for array in list(arrays))

    def drop_free(self) -> None:
        """Let go of all arrays that are not lent, e.g. of shapes that are not needed again."""
        self.nbytes -= self._free_bytes()
        self._free.clear()
