"""The compiled loop of random words, where it was built: what `kernel.c` does, called from Python.

It is optional.  Without it the same words are made in NumPy, and slower.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array
from mpitrain.arrays.compiled import address, load

LIBRARY = Path(__file__).with_name("_kernel.so")

_ABI = 1
_COUNTERS = 1 << 32


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled loop; None where it was not built, or from another version of its source."""
    found = load(LIBRARY, "mpitrain_arrays_abi", _ABI)
    if found is not None:
        found.mpitrain_philox.argtypes = [
            c_void_p, c_int64, c_uint64, c_uint64, c_uint32, c_uint32, c_uint32, c_void_p
        ]  # fmt: skip
        found.mpitrain_philox.restype = None
    return found


def philox(rows: Array, first: int, stop: int, step: int, key: tuple[int, int]) -> Array | None:
    """Encrypt the counters (block, row's low word, row's high word, step); None if there is no loop for them.

    Parameters
    ----------
    rows : array of int, shape (n,)
        NumPy or CuPy.
    first, stop : int
        The blocks: four words each.
    step : int
        Below 2³².
    key : (int, int)
        Two 32-bit words.

    Returns
    -------
    array of uint32, shape (n, 4 * (stop - first))
    """
    loops = library() if type(rows) is np.ndarray and _env.kernel() else None
    if loops is None or stop > _COUNTERS:
        return None
    numbers = np.ascontiguousarray(rows, np.uint64)
    words = np.empty((len(numbers), 4 * (stop - first)), np.uint32)
    loops.mpitrain_philox(address(numbers), len(numbers), first, stop, step, *key, address(words))
    return words
