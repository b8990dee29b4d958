"""Libraries of compiled loops: loaded where they were built, and absent where they were not."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array

Loop = Callable[..., None]

ENDINGS = {np.dtype(np.float32): "f32", np.dtype(np.float64): "f64"}
"""How the names of loops over an array's dtype end.  Bytes in another order are another dtype."""


def load(path: Path, version_of: str, version: int) -> ctypes.CDLL | None:
    """Load a library.

    Parameters
    ----------
    path : Path
        Its file, which need not be there.
    version_of : str
        Name of the function in it that returns the version of its interface.
    version : int
        The version that the caller was written for.

    Returns
    -------
    CDLL, optional
        None if it is not there, or was built from another version of its source.
    """
    try:
        found = ctypes.CDLL(str(path))
    except OSError:
        return None
    return found if found[version_of]() == version else None


@cache
def loop(library: ctypes.CDLL | None, name: str, arguments: str) -> Loop | None:
    """Return a loop whose arguments are addresses (v) and whole numbers (n); None where there is no library."""
    if library is None:
        return None
    found: Any = library[name]
    found.argtypes = [c_void_p if each == "v" else c_int64 for each in arguments]
    found.restype = None
    return found  # type: ignore[no-any-return]


def loop_over(library: ctypes.CDLL | None, name: str, arguments: str, *arrays: Array) -> Loop | None:
    """Return a loop for arrays of one dtype: NumPy's, contiguous and aligned; None where there is none for them.

    Nor is there one where ``MPITRAIN_KERNEL=off``.
    """
    dtype = arrays[0].dtype
    fit = _env.kernel() and all(
        isinstance(each, np.ndarray) and each.flags.c_contiguous and each.flags.aligned and each.dtype == dtype
        for each in arrays
    )
    ending = ENDINGS.get(dtype) if fit else None
    return loop(library, f"{name}_{ending}", arguments) if ending else None


def address(array: Array) -> int:
    """Return where a NumPy array begins."""
    return int(array.__array_interface__["data"][0])
