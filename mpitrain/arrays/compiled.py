"""Libraries of compiled loops: loaded where they were built, and absent where they were not."""

from __future__ import annotations

import ctypes
from pathlib import Path

from mpitrain._typing import Array


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


def address(array: Array) -> int:
    """Return where a NumPy array begins."""
    return int(array.__array_interface__["data"][0])
