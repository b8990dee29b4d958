"""The compiled loops of optimizers, where they were built: what `kernel.c` does, called from Python.

They are optional.  Without them the same updates run in NumPy, with the same bits, and slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array, DType
from mpitrain.arrays.compiled import load

LIBRARY = Path(__file__).with_name("_kernel.so")

_ABI = 1
_ADAM = {"float32": "mpitrain_adam_f32", "float64": "mpitrain_adam_f64"}


class AdamSettings(ctypes.Structure):
    """What one update of Adam is told; `kernel.c` says what each number is."""

    _fields_ = [
        (name, c_double) for name in ("penalty", "shrink", "follow_m", "keep_v", "follow_v", "eps", "rate")
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled loops; None where they were not built, or from another version of their source."""
    return load(LIBRARY, "mpitrain_optim_abi", _ABI)


def adam(p: Array, g: Array, m: Array, v: Array, settings: AdamSettings) -> bool:
    """Update parameters and moments of one run in place; tell whether there is a loop for them.

    Parameters
    ----------
    p, g, m, v : array, shape (n,)
        Contiguous and apart; of one dtype.
    settings : AdamSettings
        The same for all elements.
    """
    loop = _adam(p.dtype) if isinstance(p, np.ndarray) and _env.kernel() else None
    if loop is None or not all(each.flags.c_contiguous and each.dtype == p.dtype for each in (p, g, m, v)):
        return False
    loop(*map(_address, (p, g, m, v)), p.size, byref(settings))
    return True


@cache
def _adam(dtype: DType) -> Callable[..., Any] | None:
    found, name = library(), _ADAM.get(dtype.name)
    if found is None or name is None:
        return None
    loop = found[name]
    loop.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p]
    loop.restype = None
    return loop


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])
