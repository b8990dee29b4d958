"""Matrix products of 16-bit floats, which are summed in float32 and rounded once, on a CPU as on a GPU.

GPUs' matrix units do so by themselves.  NumPy has no such products: there both factors are made float32, in which the
product of two 16-bit floats is exact.  So is a stack of matrices on a GPU, where CuPy would sum float16 in the same way
and cannot take bfloat16 (cupy/cupy#10317).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays.dtypes import is_half
from mpitrain.arrays.namespace import is_cupy


class HalfProducts:
    """NumPy or CuPy with another ``matmul``; everything else is the library's own.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)

    def matmul(self, left: Array, right: Array, out: Array | None = None) -> Array:
        """Return the product; of 16-bit floats summed in float32, and rounded once to their dtype.

        Parameters
        ----------
        out : array, optional
            Where it is written.  It may be float32; the values are those that were rounded to 16 bits.
        """
        if not is_half(right.dtype):
            found: Array = self._xp.matmul(left, right, out=out)
            return found
        if is_cupy(right) and left.ndim == right.ndim == 2:
            product = self._xp.matmul(left, right)
        else:
            product = self._xp.matmul(left.astype(np.float32), right.astype(np.float32)).astype(right.dtype)
        if out is None:
            return product  # type: ignore[no-any-return]
        out[...] = product
        return out


@cache
def half_products(xp: Any) -> HalfProducts:
    """Return a library whose products of 16-bit floats are summed in float32."""
    return HalfProducts(xp)
