"""How compiled loops are found: a library beside the Python file that calls it, which says of which version it is."""

from __future__ import annotations

import ctypes
from pathlib import Path

from mpitrain._typing import Array


def load(path: Path, name: str, version: int) -> ctypes.CDLL | None:
    """Return a library of loops; None where it was not built, or from another version of its source.

    Parameters
    ----------
    path : Path
        Where the build puts it (`hatch_build.py`).
    name : str
        The function that tells its version.
    version : int
        The one that its caller was written for.
    """
    try:
        found = ctypes.CDLL(str(path))
    except OSError:
        return None
    return found if found[name]() == version else None


def address(array: Array) -> int:
    """Return where a NumPy array begins."""
    return int(array.__array_interface__["data"][0])
