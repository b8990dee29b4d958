"""Philox on a GPU: one kernel where array operations would be a hundred."""

from __future__ import annotations

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays.kernels_cuda import elementwise
from mpitrain.arrays.namespace import by_device

_GIVEN = "uint64 row, uint64 block, uint32 step, uint32 k0, uint32 k1"
_MADE = "uint32 w0, uint32 w1, uint32 w2, uint32 w3"

_ENCRYPT = """
unsigned int c0 = block, c1 = row, c2 = row >> 32, c3 = step, a = k0, b = k1;
for (int round = 0; round < 10; ++round) {
    unsigned long long high = 0xD2511F53ull * c0, low = 0xCD9E8D57ull * c2;
    c0 = (unsigned int)(low >> 32) ^ c1 ^ a;
    c1 = (unsigned int)low;
    c2 = (unsigned int)(high >> 32) ^ c3 ^ b;
    c3 = (unsigned int)high;
    a += 0x9E3779B9u;
    b += 0xBB67AE85u;
}
w0 = c0;
w1 = c1;
w2 = c2;
w3 = c3;
"""


def philox(rows: Array, first: int, stop: int, step: int, key: tuple[int, int]) -> Array:
    """Encrypt the counters (block, row's low word, row's high word, step) on the device of ``rows``.

    Parameters, result and source are those of `mpitrain.arrays.kernel.philox`; ``rows`` is a CuPy array.
    """
    cupy = by_device("gpu")
    words: Array = cupy.empty((len(rows), stop - first, 4), np.uint32)
    blocks = cupy.arange(first, stop, dtype=np.uint64)
    scalars = (np.uint32(each) for each in (step, *key))
    kernel = elementwise("philox", _GIVEN, _MADE, _ENCRYPT)
    kernel(rows.astype(np.uint64)[:, None], blocks, *scalars, *(words[..., word] for word in range(4)))
    return words.reshape(len(rows), 4 * (stop - first))
