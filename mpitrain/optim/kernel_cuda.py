"""What `mpitrain.optim.kernel` does, on a GPU: one kernel passes over memory once, where array operations take 14."""

from __future__ import annotations

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array
from mpitrain.arrays.kernels_cuda import elementwise

_NUMBERS = ("penalty", "shrink", "follow_m", "keep_v", "follow_v", "eps", "rate", "count")
_GIVEN = ", ".join(f"T {name}" for name in ("sum", *_NUMBERS))
_ADAM = """
const T g = sum / count + penalty * p;
m += (g - m) * follow_m;
v = v * keep_v + g * g * follow_v;
p = p * shrink - m / (sqrt(v) + eps) * rate;
"""


def adam(p: Array, sums: tuple[Array, ...], m: Array, v: Array, **numbers: float) -> bool:
    """Update parameters and moments in place, within rounding of the array operations; tell whether there is a kernel.

    Parameters
    ----------
    p, m, v : CuPy array, shape (n,)
        Of one dtype; there is a kernel for float32 and for float64.
    sums : tuple of CuPy array
        The terms of the gradients' sum; there is a kernel for one.
    **numbers : float
        What `mpitrain.optim.kernel.AdamSettings` holds.
    """
    dtypes = {each.dtype for each in (p, m, v, *sums)}
    if len(sums) > 1 or len(dtypes) > 1 or p.dtype not in (np.float32, np.float64) or not _env.kernel():
        return False
    elementwise("adam", _GIVEN, "T p, T m, T v", _ADAM)(*sums, *(numbers[name] for name in _NUMBERS), p, m, v)
    return True
