"""Where in a program a communicator was called: the line that a person would look at, not one of the machinery."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType

_COMM = f"{Path(__file__).parent}{os.sep}"
_PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"
_LIBRARIES = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def call_site(frame: FrameType | None = None) -> str:
    """Return ``file:line`` of whoever called the communicator, and of the user's program if that is another.

    Parameters
    ----------
    frame : frame, optional
        Innermost frame of the thread in question; that of the caller if None.

    Returns
    -------
    str
        E.g. ``train.py:33``, or ``mpitrain/parallel/data.py:88 (from train.py:33)``.
    """
    found: list[str] = []
    for caller in _callers(frame or sys._getframe(1)):
        path = caller.f_code.co_filename
        if _kind(path) in ("mpitrain", "user") and (not found or _kind(path) == "user"):
            found.append(f"{shown(path)}:{caller.f_lineno}")
        if _kind(path) == "user":
            break
    return " (from ".join(found) + ")" * (len(found) - 1) if found else "an unknown line"


def nearest_line(frame: FrameType | None) -> tuple[str, int]:
    """Return file and line of the nearest caller of the communicator; `call_site` at a tenth of the cost."""
    while frame is not None:
        path = frame.f_code.co_filename
        if _kind(path) in ("mpitrain", "user"):
            return path, frame.f_lineno
        frame = frame.f_back
    return "an unknown file", 0


def in_communicator(frame: FrameType) -> bool:
    """Tell whether a thread with this innermost frame is inside a call of a communicator."""
    return any(_kind(caller.f_code.co_filename) == "comm" for caller in _callers(frame))


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@cache
def _kind(path: str) -> str:
    if path.startswith(_COMM):
        return "comm"
    if path.startswith(_PACKAGE):  # which may lie among the libraries
        return "mpitrain"
    return "library" if path.startswith((*_LIBRARIES, "<frozen")) else "user"


@cache
def shown(path: str) -> str:
    """Shorten a path: the package's own from its name on, those below the working directory from there."""
    if path.startswith(_PACKAGE):
        return str(Path(path).relative_to(Path(_PACKAGE).parent))
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if path.startswith(f"{here}/") else path
