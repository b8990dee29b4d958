"""A mean gradient that has not been computed: the terms that are to be summed, and the count to divide by.

An optimizer that takes `Terms` sums and divides while it updates.  So the gradients of several ranks are read once,
where they lie, and neither their sum nor their mean is ever written to memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpitrain._typing import Array
from mpitrain.arrays import namespace


@dataclass(frozen=True)
class Terms:
    """Gradients as a sum of arrays, divided by a count.

    Parameters
    ----------
    arrays : tuple of array, each of shape (n,)
        The terms, which are added up in this order.  Those of other ranks are only read.
    count : float
        What the sum is divided by; it is rounded to the arrays' dtype first.
    own : int
        Which of the arrays is this rank's.
    parameters_are_read : bool
        Whether other ranks read the parameters that are updated, where they lie.

    Notes
    -----
    ``own`` and ``parameters_are_read`` change no value, but tell compiled loops how to spare caches.
    """

    arrays: tuple[Array, ...]
    count: float = 1.0
    own: int = 0
    parameters_are_read: bool = False

    def cut(self, where: slice) -> Terms:
        """Return a stretch of them, as views."""
        arrays = tuple(array[where] for array in self.arrays)
        return Terms(arrays, self.count, self.own, self.parameters_are_read)

    def sum(self) -> Array:
        """Return the sum; a new array."""
        total: Array = self.arrays[0].copy()
        for array in self.arrays[1:]:
            total += array
        return total

    def mean(self, out: Array) -> Array:
        """Return the mean, written to ``out``, shape (n,); where it is the only term (`is_mean`), that array itself."""
        if self.is_mean:
            return self.arrays[0]
        out[...] = self.arrays[0]
        for array in self.arrays[1:]:
            out += array
        namespace(out).divide(out, out.dtype.type(self.count), out=out)
        return out

    @property
    def is_mean(self) -> bool:
        """Whether the mean is the only term: one array, and a count of 1."""
        return len(self.arrays) == 1 and self.count == 1
