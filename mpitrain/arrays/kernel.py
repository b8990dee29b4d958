"""The compiled loop of random words, where it was built: what `kernel.c` does, called from Python.

It is optional.  Without it the same words are made in NumPy, and slower.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array
from mpitrain.arrays.compiled import CompiledLibrary, address

LIBRARY = CompiledLibrary(Path(__file__).with_name("_kernel.so"), "mpitrain_arrays_abi", 1)
_COUNTERS = 1 << 32


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
    fits = type(rows) is np.ndarray and _env.kernel() and stop <= _COUNTERS
    run = LIBRARY.loop("mpitrain_philox", "vnuuwwwv") if fits else None
    if run is None:
        return None
    numbers = np.ascontiguousarray(rows, np.uint64)
    words = np.empty((len(numbers), 4 * (stop - first)), np.uint32)
    run(address(numbers), len(numbers), first, stop, step, *key, address(words))
    return words
