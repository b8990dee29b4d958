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
        Where it would be.
    version_of : str
        Its function that returns the version of its calls.
    version : int
        The one that is wanted.

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
