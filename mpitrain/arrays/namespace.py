"""In which library to compute with an array: NumPy, or CuPy wherever an array is a CuPy array.

Arrays that are only moved may be of others too: see `mpitrain.arrays.libraries`.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from mpitrain._errors import InputError, MissingExtraError
from mpitrain._typing import Array


def is_cupy(array: object) -> bool:
    """Tell whether ``array`` is a CuPy array, without importing CuPy."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def namespace(*arrays: object) -> Any:
    """Return the module (``numpy`` or ``cupy``) whose functions work on all of ``arrays``.

    Raises
    ------
    InputError
        NumPy and CuPy arrays are mixed.
    """
    kinds = {is_cupy(array) for array in arrays if hasattr(array, "shape")}
    if kinds == {True, False}:
        raise InputError(
            "host and device arrays are mixed", got=", ".join(type(a).__name__ for a in arrays),
            remedy="move them to one place with cupy.asarray or cupy.asnumpy",
        )  # fmt: skip
    return sys.modules["cupy"] if kinds == {True} else np


def by_device(device: str) -> Any:
    """Return ``numpy`` for ``"cpu"`` and ``cupy`` for ``"gpu"``.

    Raises
    ------
    MissingExtraError
        CuPy is not installed.
    """
    if device == "cpu":
        return np
    if device != "gpu":
        raise InputError("unknown device", got=repr(device), expected="'cpu' or 'gpu'")
    try:
        import cupy
    except ImportError as error:
        raise MissingExtraError(
            "a GPU was asked for, but CuPy cannot be imported", got=str(error),
            remedy="pip install 'mpitrain[cuda13]' (or cuda12, whichever the driver supports)",
        ) from error  # fmt: skip
    return cupy


def to_host(array: Array) -> Array:
    """Return ``array`` as a NumPy array; a device array is copied, and its current stream waited for."""
    if not is_cupy(array):
        return np.asarray(array)
    host: Array = sys.modules["cupy"].asnumpy(array)
    return host
