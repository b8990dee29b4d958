"""The compiled loops of optimizers, where they were built: what `kernel.c` does, called from Python.

They are optional.  Without them the same updates run in NumPy, with the same bits, and slower.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array, DType
from mpitrain.arrays.compiled import address, load
from mpitrain.optim.terms import Terms

LIBRARY = Path(__file__).with_name("_kernel.so")

_ABI = 2
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "adam": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
    "add": (c_void_p, c_void_p, c_int64),
}
_NAMES = {"float32": "f32", "float64": "f64"}


class AdamSettings(ctypes.Structure):
    """What one update of Adam is told; `kernel.c` says what each number is."""

    _fields_ = [
        (name, c_double) for name in ("penalty", "shrink", "follow_m", "keep_v", "follow_v", "eps", "rate", "count")
    ]  # fmt: skip


class _Sources(ctypes.Structure):
    """Where the terms of gradients lie, and who else reads and writes nearby."""

    _fields_ = [
        ("terms", POINTER(c_void_p)), ("term_count", c_int64), ("own", c_int64), ("parameters_are_read", c_int64),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled loops; None where they were not built, or from another version of their source."""
    return load(LIBRARY, "mpitrain_optim_abi", _ABI)


def adam(p: Array, terms: Terms, m: Array, v: Array, settings: AdamSettings) -> bool:
    """Update parameters and moments of one run in place; tell whether there is a loop for them.

    Parameters
    ----------
    p, m, v : array, shape (n,)
        Contiguous and apart; of one dtype.
    terms : Terms
        Of the gradients, the same.
    settings : AdamSettings
        The same for all elements, but for ``count``, which is the terms'.
    """
    loop = _loop("adam", (p, m, v, *terms.arrays))
    if loop is None:
        return False
    settings.count = terms.count
    loop(address(p), byref(_sources(terms)), address(m), address(v), p.size, byref(settings))
    return True


def add(sums: Array, terms: Terms) -> None:
    """Add the sum of all terms to ``sums``, shape (n,), by a compiled loop where there is one."""
    loop = _loop("add", (sums, *terms.arrays))
    if loop is None:
        sums += terms.sum()
    else:
        loop(address(sums), byref(_sources(terms)), sums.size)


def _loop(what: str, arrays: tuple[Array, ...]) -> Callable[..., Any] | None:
    """Return the loop for some arrays: of NumPy, contiguous, and of one dtype that has one."""
    fit = all(
        isinstance(each, np.ndarray) and each.flags.c_contiguous and each.dtype == arrays[0].dtype for each in arrays
    )
    return _compiled(what, arrays[0].dtype) if fit and _env.kernel() else None


@cache
def _compiled(what: str, dtype: DType) -> Callable[..., Any] | None:
    found, name = library(), _NAMES.get(dtype.name)
    if found is None or name is None:
        return None
    loop = found[f"mpitrain_{what}_{name}"]
    loop.argtypes = _ARGUMENTS[what]
    loop.restype = None
    return loop


def _sources(terms: Terms) -> _Sources:
    addresses = (c_void_p * len(terms.arrays))(*map(address, terms.arrays))
    return _Sources(addresses, len(addresses), terms.own, terms.parameters_are_read)
