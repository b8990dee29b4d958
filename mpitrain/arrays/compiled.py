"""Libraries of compiled loops: loaded where they were built, and absent where they were not."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_double, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array, DType

Loop = Callable[..., None]

_ARGUMENTS = {"v": c_void_p, "n": c_int64, "u": c_uint64, "w": c_uint32, "d": c_double}
"""Of loops, by letters: addresses, whole numbers, those without a sign, words of 32 bits, and floats."""

_ENDINGS = {np.dtype(np.float32): "_f32", np.dtype(np.float64): "_f64"}
"""How the names of loops over an array's dtype end.  Bytes in another order are another dtype."""


@dataclass(frozen=True, eq=False)
class CompiledLibrary:
    """The compiled loops of one `kernel.c`, loaded when they are first asked for.

    Parameters
    ----------
    path : Path
        Its file, which need not be there.
    version_of : str
        Name of the function in it that returns the version of its interface.
    version : int
        The version that its callers are written for.
    """

    path: Path
    version_of: str
    version: int

    @cached_property
    def loaded(self) -> ctypes.CDLL | None:
        """The library; None where it was not built, or from another version of its source."""
        try:
            found = ctypes.CDLL(str(self.path))
        except OSError:
            return None
        return found if found[self.version_of]() == self.version else None

    def loop(self, name: str, arguments: str, dtype: DType | None = None) -> Loop | None:
        """Return a loop; None where there is none.

        Parameters
        ----------
        name : str
            Of the function, but for its ending if there is one for each dtype.
        arguments : str
            A letter for each: an address (v), a whole number (n), one without a sign (u), a word of 32 bits (w), or a
            float (d).
        dtype : numpy.dtype, optional
            Of the arrays, if there is a loop for float32, or one for it and one for float64.
        """
        return _loop(self, name, arguments, dtype)

    def loop_over(self, name: str, arguments: str, *arrays: Array) -> Loop | None:
        """Return a loop for arrays of one dtype: NumPy's, contiguous and aligned; None where there is none for them.

        Nor is there one where ``MPITRAIN_KERNEL=off``.
        """
        dtype = arrays[0].dtype
        fit = _env.kernel() and all(
            isinstance(each, np.ndarray) and each.flags.c_contiguous and each.flags.aligned and each.dtype == dtype
            for each in arrays
        )
        return _loop(self, name, arguments, dtype) if fit else None


@cache
def _loop(library: CompiledLibrary, name: str, arguments: str, dtype: DType | None) -> Loop | None:
    ending = "" if dtype is None else _ENDINGS.get(dtype)
    found: Any = None if library.loaded is None or ending is None else getattr(library.loaded, name + ending, None)
    if found is None:
        return None
    found.argtypes = [_ARGUMENTS[each] for each in arguments]
    found.restype = None
    return found  # type: ignore[no-any-return]


def address(array: Array) -> int:
    """Return where a NumPy array begins."""
    return int(array.__array_interface__["data"][0])
