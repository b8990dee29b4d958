"""Tokens on disk, made by a tokenizer of the user's: memory-mapped, so that they may be more than memory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from mpitrain._errors import DataError
from mpitrain._typing import Array
from mpitrain.data.dataset import BLOCK_BYTES, Dataset
from mpitrain.data.sources.files import PathLike, reading
from mpitrain.data.sources.numpy_files import open_npy
from mpitrain.data.windows import windows


def tokens(
    *,
    path: PathLike,
    vocabulary_size: int,
    context: int = 1,
    stride: int | None = None,
    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] = "uint16",
) -> Dataset:
    """Return the next-token pairs of a file of tokens.

    Parameters
    ----------
    path : path
        ``.npy`` with integers (m,), or any other suffix for the bare numbers, in this machine's byte order.
    vocabulary_size : int
        Number of different tokens; those in the file lie in [0, vocabulary_size).
    context, stride
        As for `text`.
    dtype : {"uint8", "uint16", "uint32", "int32", "int64"}
        Type of the bare numbers; a ``.npy`` file says its own.

    Returns
    -------
    Dataset
        A ``sequence``; the tokens are named by their numbers.

    Raises
    ------
    DataError
        The file is missing or malformed, or has a token that is not in the vocabulary.
    """
    found = open_npy(path) if Path(path).suffix.lower() == ".npy" else _open_raw(path, dtype)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        got = f"{found.dtype} of shape {found.shape}"
        raise DataError(f"{path}: does not hold tokens", got=got, expected="integers of shape (m,)")
    _check_range(found, vocabulary_size, str(path))
    return windows(found, str(path), context, stride, tuple(map(str, range(vocabulary_size))))


def _open_raw(path: PathLike, dtype: str) -> Array:
    with reading(path, f"numbers of type {dtype}") as file:
        return np.memmap(file, dtype, "r")


def _check_range(found: Array, size: int, name: str) -> None:
    step = BLOCK_BYTES // found.itemsize
    for first in range(0, len(found), step):
        block = found[first : first + step]
        wrong = np.flatnonzero((block < 0) | (block >= size))
        if wrong.size:
            raise DataError(
                f"{name}: token {first + wrong[0]} (counted from 0) is out of range", got=block[wrong[0]],
                expected=f"0 to {size - 1}, as vocabulary_size = {size}",
            )  # fmt: skip
