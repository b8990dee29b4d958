"""Turns the ways in which a file can be unusable into one clear message."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from mpitrain._errors import DataError, MpitrainError

PathLike: TypeAlias = str | os.PathLike[str]


@contextmanager
def reading(path: PathLike, expected: str) -> Iterator[Path]:
    """Give the path of a file to read; whatever goes wrong while it is read becomes a `DataError`.

    Parameters
    ----------
    path : path
        The file.
    expected : str
        What it should hold, for the message.
    """
    path = Path(path)
    try:
        if not path.exists():
            remedy = None if path.is_absolute() else f"the current directory is {Path.cwd()}"
            raise DataError(f"{path}: no such file", expected=expected, remedy=remedy)
        if not path.is_file():
            raise DataError(f"{path}: not a file", expected=expected)
        yield path
    except MpitrainError:
        raise
    except PermissionError as error:
        raise DataError(f"{path}: permission denied", expected=f"a readable file with {expected}") from error
    except Exception as error:  # a malformed file makes its parser raise nearly anything
        problem = str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be read", got=problem, expected=expected) from error
